"""What the last steps of a training say of its task, so that no pass over the data has to follow."""

import contextlib
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..memory.accumulators import Storage
from ..memory.budget import LayerShape, choose_storage
from ..memory.observation import Observation
from ..methods.base import Snapshot
from ..published.files import write_tensors
from .surface import TrainerSurface

logger = logging.get_logger(__name__)

_FILE = "eblora_observed-{}-of-{}.safetensors"  # of each process, beside a checkpoint
_OBSERVED = ("token-gradients", "curvature")
_AT_MOST = 0.5  # of the steps: what they said before that is of other weights


class ObservingMixin(TrainerSurface):
    """Overrides the training step, which is observed towards the end of a task, and what a checkpoint holds of it."""

    _observation: Observation | None = None
    _observed_before: tuple[int, list[dict[str, torch.Tensor]]] | None = None  # steps of a resumed run, and sums

    @property
    def observed_steps(self) -> int:
        """
        How many of the last steps of a task are observed: the share `observe_steps` of them, or what it takes to see
        `snapshot_samples` samples, at most half.
        """
        config, steps = self.eblora_config, self.state.max_steps
        unwanted = config.snapshot_fraction is not None or config.snapshot_at != "current" or not config.observe_steps
        # rows of earlier tasks are no part of the task, and a model need not keep rows apart
        mixes = bool(config.replay_fraction and self.begun.sequence.tasks)
        if self.method.remembers not in _OBSERVED or unwanted or mixes:
            return 0
        wanted = max(config.observe_steps * steps, config.snapshot_samples / self.samples_of_step)
        return max(min(math.ceil(wanted), math.floor(_AT_MOST * steps)), 1)

    @property
    def samples_of_step(self) -> int:
        """Samples of one optimizer step on all processes."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def storage_of(self, of: Snapshot) -> Storage:
        """Where the sums of a snapshot are kept: as the options say, or by the shapes of the layers."""
        config = self.eblora_config
        if config.snapshot_offload or config.snapshot_sketch is not None:
            return Storage(config.snapshot_offload, config.snapshot_sketch)
        shapes = [LayerShape(layer.d_out, layer.d_in, layer.rank) for layer in self.layers]
        return choose_storage(shapes, second_moment=of != "gradients", budget=config.basis_budget)

    def forget_observation(self) -> None:
        """Lets go of what was observed of a task."""
        self._observation, self._observed_before = None, None

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        self._observation = None  # a second attempt with a smaller batch begins anew (`auto_find_batch_size`)
        return super().create_scheduler(*args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.state.global_step < self.state.max_steps - self.observed_steps:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._observation is None:
            self._observation = self._new_observation()
        # compiled code would go on without the hooks; a fifth of the steps does without it
        eager = torch.compiler.set_stance("force_eager") if self.args.torch_compile else contextlib.nullcontext()
        items = self.items_of(inputs, num_items_in_batch, self.current_gradient_accumulation_steps)
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        with eager, self._observation.watching(self.state.global_step, items, scale):
            return super().training_step(model, inputs, num_items_in_batch)

    def _new_observation(self) -> Observation:
        """One that goes on from what the resumed run has seen."""
        # of a whole step, whichever comes first: a resumed run has to take as many tokens of a pass
        loader: Any = self.callback_handler.train_dataloader
        passes = min(self.args.gradient_accumulation_steps, len(loader))
        observation = Observation(
            self.layers,
            self.storage_of("token-gradients"),
            self.bases | (self.constraint.bases if self.constraint is not None else {}),  # those on the device
            self.observed_steps * passes,
            processes=self.args.world_size,
            may_overflow=self.accelerator.mixed_precision == "fp16",
            both_sides=self.method.remembers == "curvature",
        )
        if self._observed_before is not None:
            observation.steps, states = self._observed_before
            for state in states:
                observation.load_state_dict(state)
        return observation

    def items_of(self, inputs: dict[str, Any], num_items: torch.Tensor | int | None, passes: int) -> Any:
        """By what the loss of a step of so many such passes is divided on this process."""
        # the parent's own rule of what it divides by
        divided = getattr(self, "loss_is_scaled_for_ga", None)
        if divided is None:
            divided = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not divided or num_items is None:
            return self.terms_of(inputs) * passes
        # those of all processes together are undone by a factor in `compute_loss`
        return num_items / (self.args.world_size if self.args.average_tokens_across_devices else 1)

    def terms_of(self, inputs: dict[str, Any]) -> Any:
        """Of how many terms a model takes its own mean: the labels of a batch that count, or its samples."""
        labels = inputs.get("labels")
        if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
            return (labels != -100).sum().clamp_min(1)
        return find_batch_size(inputs) or 1

    def observed(self) -> dict[str, Any] | None:
        """
        What was observed of the task whose training has ended; `None`, and a line in the log, if that is too little.
        """
        wanted = self.observed_steps
        if not wanted:
            if self.method.remembers in _OBSERVED and self.eblora_config.snapshot_fraction is None:
                logger.info("The training was not observed, as its options want it: a snapshot of the task is taken.")
            return None
        if self._observation is None and self._observed_before is not None:
            self._observation = self._new_observation()
        observation, best = self._observation, self.state.best_global_step
        self.forget_observation()
        if observation is None or 2 * observation.steps < wanted:
            reason = f"{0 if observation is None else observation.steps} of {wanted} steps were observed"
        elif self.args.load_best_model_at_end and best and best <= self.state.max_steps - wanted:
            reason = f"the best weights are those of step {best}"
        elif missing := observation.missing():
            reason = f"nothing was seen of {missing[0]}"
        else:
            return observation.means()
        logger.warning(f"The end of the training says too little of the task ({reason}): a snapshot of it is taken.")
        return None

    # ---- checkpoints ----

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self._observation is not None:  # before the parent writes the state that says the checkpoint is whole
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            name = _FILE.format(self.args.process_index, self.args.world_size)
            write_tensors(folder / name, self._observation.state_dict())
        super()._save_checkpoint(model, trial)

    def load_observation(self, checkpoint: str) -> None:
        """
        Sets what the next observation goes on from: what this process has seen before, or, if there were more or
        fewer processes, its share of what they have.

        Raises:
            ValueError: if a file is damaged.
        """
        self.forget_observation()
        index, count = self.args.process_index, self.args.world_size
        every = sorted(Path(checkpoint).glob(_FILE.format("*", "*")))
        if not every:
            return
        own = Path(checkpoint) / _FILE.format(index, count)
        files = [own] if own.is_file() else every[index::count]
        # the number of steps is the same in all, and all have to agree whether they are enough
        states = {file: _read(file) for file in {every[0], *files}}
        both_sides = all(any(key.startswith("outputs of ") for key in state) for state in states.values())
        if self.method.remembers == "curvature" and not both_sides:
            return  # observed without a penalty: too little, so that a snapshot is taken
        self._observed_before = int(states[every[0]]["steps"]), [states[file] for file in files]


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged ({error}). Delete the checkpoint folder and resume from an earlier one."
        ) from error
