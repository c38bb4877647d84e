"""`ContinualEBLoRASeq2SeqTrainer`: the continual trainer with generation in evaluation."""

from transformers import Seq2SeqTrainer

from .continual import ContinualMixin


class ContinualEBLoRASeq2SeqTrainer(ContinualMixin, Seq2SeqTrainer):
    """
    `transformers.Seq2SeqTrainer` that learns tasks one after another, as [`ContinualEBLoRATrainer`] does.

    Takes the arguments of `Seq2SeqTrainer`, and those of [`ContinualMixin`] by keyword.
    """
