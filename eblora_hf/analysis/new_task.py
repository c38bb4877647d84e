"""A trainer for the next task of a sequence, built from the names of a model and a data set."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
import transformers
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, TrainingArguments

from ..config import EBLoRAConfig
from ..published.loading import fetch_sequence
from ..trainers.trainer import ContinualEBLoRATrainer

# kind: model class, and the columns that a data set needs
KINDS = {
    "text-classification": ("AutoModelForSequenceClassification", ("text", "label")),
    "image-classification": ("AutoModelForImageClassification", ("image", "label")),
    "causal-lm": ("AutoModelForCausalLM", ("text",)),
}


def new_task_trainer(
    sequence: str,
    model: str,
    dataset: str,
    kind: str,
    *,
    split: str = "train",
    rank: int | None = None,
    fraction: float = 0.2,
    folder: str,
) -> ContinualEBLoRATrainer:
    """
    Builds the trainer that would learn a data set as the next task of a sequence, with the sequence's target modules.

    Args:
        sequence (`str`): Folder or Hub repository of the published sequence.
        model (`str`), dataset (`str`): Folder or Hub repository of its base model and of the new data.
        kind (`str`): One of `KINDS`.
        split (`str`, defaults to `"train"`): Split of the data set.
        rank (`int`, *optional*): LoRA rank of the new task, by default that of the newest task.
        fraction (`float`, defaults to 0.2): Share of the data used for gradient snapshots.
        folder (`str`): Output folder of the trainer.

    Raises:
        ValueError: if the data set lacks a column that the kind needs, or has labels that the model has not.
        FileNotFoundError: if there is no sequence.
    """
    published = fetch_sequence(sequence)
    model_class, columns = KINDS[kind]
    data = datasets.load_dataset(dataset, split=split)
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise ValueError(
            f"{dataset} ({split}) has the columns {', '.join(data.column_names)}, but {kind} needs "
            f"{' and '.join(columns)}. Rename them, or build the trainer in Python and call `interference_report`."
        )
    labels = published.base_model["num_labels"]
    sizes = {} if kind == "causal-lm" or labels is None else {"num_labels": labels}
    base = getattr(transformers, model_class).from_pretrained(model, **sizes)
    if "label" in columns:
        unknown = {str(label) for label in data["label"] if label not in range(base.config.num_labels)}
        if unknown:
            raise ValueError(
                f"{dataset} ({split}) has the label(s) {', '.join(sorted(unknown))}, but those of {model} are 0 to "
                f"{base.config.num_labels - 1}."
            )
    transform, collator = _preprocessing(kind, model)
    peft_config = published.config()
    peft_config.inference_mode = False
    if rank is not None:
        peft_config.r, peft_config.lora_alpha = rank, rank
        peft_config.rank_pattern, peft_config.alpha_pattern = {}, {}
    return ContinualEBLoRATrainer(
        model=base,
        args=TrainingArguments(
            output_dir=folder,
            remove_unused_columns=False,  # the transform below reads the raw columns
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=collator,
        peft_config=peft_config,
        eblora_config=EBLoRAConfig(snapshot_fraction=fraction),
        train_dataset=data.with_transform(transform),
        sequence=sequence,
        task_name="new-task",
    )


def _preprocessing(kind: str, model: str) -> tuple[Callable[[dict], dict], Callable[[list], Any]]:
    """What maps a batch of raw columns to inputs, and what stacks inputs into a batch."""
    if kind == "image-classification":
        processor = transformers.AutoImageProcessor.from_pretrained(model)

        def images(batch: dict) -> dict:
            pixels = processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")
            return {"pixel_values": pixels["pixel_values"], "labels": torch.tensor(batch["label"])}

        return images, transformers.default_data_collator
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def texts(batch: dict) -> dict:
        labels = {"labels": batch["label"]} if kind == "text-classification" else {}
        return {**tokenizer(batch["text"], truncation=True), **labels}

    if kind == "causal-lm":
        return texts, DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return texts, DataCollatorWithPadding(tokenizer)
