"""`ContinualEBLoRADPOTrainer` and `ContinualEBLoRARewardTrainer` over TRL's trainers, which have to be installed."""

try:
    from trl import DPOTrainer, RewardTrainer
except ImportError as error:
    raise ImportError(
        "ContinualEBLoRADPOTrainer and ContinualEBLoRARewardTrainer need TRL, which could not be imported. Install "
        "it: pip install 'eblora-hf[trl]'."
    ) from error

from .continual import ContinualMixin


class ContinualEBLoRADPOTrainer(ContinualMixin, DPOTrainer):
    """
    `trl.DPOTrainer` that learns tasks one after another, as [`ContinualEBLoRATrainer`] does.

    Takes the arguments of `DPOTrainer`, and those of [`ContinualMixin`] by keyword. The reference of a task is the
    model before it, with all earlier tasks: that of `model.disable_adapter()` while it is learnt.
    """


class ContinualEBLoRARewardTrainer(ContinualMixin, RewardTrainer):
    """
    `trl.RewardTrainer` that learns tasks one after another, as [`ContinualEBLoRATrainer`] does.

    Takes the arguments of `RewardTrainer`, and those of [`ContinualMixin`] by keyword.
    """
