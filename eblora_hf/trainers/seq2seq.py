"""`ContinualEBLoRASeq2SeqTrainer`: the continual trainer with generation in evaluation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from ..config import EBLoRAConfig
from ..tasks import TaskSequence
from .arguments import Processing
from .continual import ContinualMixin


class ContinualEBLoRASeq2SeqTrainer(ContinualMixin, Seq2SeqTrainer):
    """
    `transformers.Seq2SeqTrainer` that learns tasks one after another, as [`ContinualEBLoRATrainer`] does.

    Takes the arguments of `Seq2SeqTrainer`, and those of [`ContinualMixin`] by keyword.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: TaskSequence | Mapping[str, Any] | Dataset | None = None,
        eval_dataset: Mapping[str, Any] | Dataset | None = None,
        processing_class: Processing | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        peft_config: LoraConfig | None = None,
        eblora_config: EBLoRAConfig | None = None,
        sequence: str | Path | None = None,
        task_name: str | None = None,
        push_bases: bool | str | None = None,
        protect_data: Dataset | None = None,
        anchor: Dataset | str | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            eblora_config=eblora_config,
            sequence=sequence,
            task_name=task_name,
            push_bases=push_bases,
            protect_data=protect_data,
            anchor=anchor,
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The parent gathers rows that even batches have repeated, too: numbers then depend on the processes."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)
