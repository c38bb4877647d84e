# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["eblora-hf", "datasets>=4", "pyyaml"]
#
# [tool.uv.sources]
# eblora-hf = { path = ".." }
# ///
"""
Learns text classification tasks one after another, with one head over the labels of all tasks.

A task's data has the columns `text` and `label`, and `text_pair` where it is about pairs; scripts/README.md explains
the list of tasks.

    python scripts/run_text_classification.py --model_name_or_path FacebookAI/roberta-base --tasks tasks.yaml \\
        --output_dir out --num_train_epochs 3 --learning_rate 1e-4 --per_device_train_batch_size 32

    python scripts/run_text_classification.py arguments.yaml  # the same names in a file
"""

from dataclasses import dataclass, field

from arguments import LabelArguments, ModelArguments, parse_arguments
from common import accuracy, as_sequence, largest, learn, load_tasks, share_labels
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eblora_hf import ContinualEBLoRATrainer


@dataclass
class TextClassificationArguments(LabelArguments):
    max_length: int = field(default=256, metadata={"help": "Longer texts are cut to so many tokens."})


def main() -> None:
    model_args, data_args, training_args, eblora_config = parse_arguments(ModelArguments, TextClassificationArguments)
    tasks = load_tasks(data_args, forms=[("text", "label")], optional_columns=["text_pair"])
    head = share_labels(tasks, data_args.labels)

    name, revision = model_args.model_name_or_path, model_args.model_revision
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    model = AutoModelForSequenceClassification.from_pretrained(name, **model_args.loading, **head)
    if tokenizer.pad_token is None:  # decoders
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id

    def tokenize(batch: dict) -> dict:
        return tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=data_args.max_length)

    def encode(data: Dataset, split: str) -> Dataset:
        texts = [column for column in ("text", "text_pair") if column in data.column_names]
        return data.map(tokenize, batched=True, remove_columns=texts, desc=f"Tokenize {split}")

    with training_args.main_process_first():
        for task in tasks:
            task.apply(encode)

    trainer = ContinualEBLoRATrainer(
        model=model,
        args=training_args,
        train_dataset=as_sequence(tasks),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=largest,
        peft_config=model_args.lora_config(task_type="SEQ_CLS"),
        eblora_config=eblora_config,
        sequence=data_args.sequence,
    )
    learn(trainer, zero_shot=data_args.zero_shot)


if __name__ == "__main__":
    main()
