"""`ContinualEBLoRASFTTrainer`: the continual trainer over TRL's `SFTTrainer`, which has to be installed."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

try:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import create_model_from_path
except ImportError as error:
    raise ImportError(
        "ContinualEBLoRASFTTrainer needs TRL, which could not be imported. Install it: pip install 'eblora-hf[trl]'."
    ) from error

from ..config import EBLoRAConfig
from ..tasks import TaskSequence
from .arguments import Processing
from .continual import ContinualMixin


class ContinualEBLoRASFTTrainer(ContinualMixin, SFTTrainer):
    """
    `trl.SFTTrainer` that learns tasks one after another, as [`ContinualEBLoRATrainer`] does.

    Takes the arguments of `SFTTrainer`, and those of [`ContinualMixin`] by keyword. Every task's data are prepared as
    `SFTTrainer` prepares its own: chat template, formatting function, tokenisation, packing.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: TaskSequence | Mapping[str, Any] | Dataset | None = None,
        eval_dataset: Mapping[str, Any] | Dataset | None = None,
        processing_class: Processing | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        eblora_config: EBLoRAConfig | None = None,
        sequence: str | Path | None = None,
        task_name: str | None = None,
        push_bases: bool | str | None = None,
        protect_data: Dataset | None = None,
        anchor: Dataset | str | None = None,
    ):
        if isinstance(model, str):
            model, args = _load(model, args, quantization_config)
            quantization_config = None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
            eblora_config=eblora_config,
            sequence=sequence,
            task_name=task_name,
            push_bases=push_bases,
            protect_data=protect_data,
            anchor=anchor,
        )

    def prepared(self, tasks: TaskSequence) -> TaskSequence:
        if self.args.completion_only_loss is None:  # SFTTrainer has decided it by the first task
            columns = {task.name: getattr(task.train_dataset, "column_names", ()) for task in tasks}
            completions = {name: "completion" in names for name, names in columns.items()}
            if len(set(completions.values())) > 1:
                raise ValueError(
                    f"The tasks {', '.join(name for name, has in completions.items() if has)} have prompts and "
                    "completions and the others have not, so that their losses are of other tokens. Say which with "
                    "SFTConfig(completion_only_loss=…), or bring all tasks into one format."
                )
        return super().prepared(tasks)


def _load(
    name: str, args: SFTConfig | TrainingArguments | None, quantization_config: BitsAndBytesConfig | None
) -> tuple[PreTrainedModel, SFTConfig | TrainingArguments | None]:
    """The model of that name, loaded as SFTTrainer would, and the arguments without what that took."""
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args is not None and options:
        args = copy.copy(args)
        vars(args)["model_init_kwargs"] = None
    return create_model_from_path(name, **options), args
