# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["eblora-hf", "datasets>=4", "pyyaml", "sentencepiece"]
#
# [tool.uv.sources]
# eblora-hf = { path = ".." }
# ///
"""
Teaches an encoder-decoder such as T5 tasks from text to text one after another, and evaluates them by generation.

A task's data has the columns `text` and `label` or `target`: what is to be written. `prompt` says how a text becomes a
question ("{text}" by default); in it, `{labels}` stands for the labels of the task, which `labels` may name.
scripts/README.md explains the list of tasks. `accuracy` is the share of answers that are right, letter by letter.

    python scripts/run_seq2seq.py scripts/configs/text-order-1.yaml  # after naming the folder of the data in it
    python scripts/run_seq2seq.py --model_name_or_path google-t5/t5-base --tasks tasks.yaml --output_dir out
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
from arguments import DataArguments, ModelArguments, parse_arguments
from common import TaskData, as_sequence, learn, load_tasks, name_labels
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainingArguments,
)

from eblora_hf import ContinualEBLoRASeq2SeqTrainer

IGNORED = -100


@dataclass
class TextArguments(DataArguments):
    max_source_length: int = field(default=512, metadata={"help": "Tokens of a question; longer ones are cut."})
    max_target_length: int = field(default=50, metadata={"help": "Tokens of an answer, at most."})
    samples_per_label: Optional[int] = field(  # noqa: UP045 - HfArgumentParser needs it on Python 3.10
        default=None, metadata={"help": "Use the first so many training rows of each label alone."}
    )


def as_questions(task: TaskData, samples_per_label: int | None) -> None:
    """
    Makes the columns of a task `text`, the question, and `target`, its answer.

    Raises:
        ValueError: if the prompt has no `{text}`, or a label is none of those that the task names.
    """
    prompt, named = task.options.get("prompt", "{text}"), task.options.get("labels")
    if "{text}" not in prompt:
        raise ValueError(f"The task {task.name!r} has prompt={prompt!r}, which needs {{text}} for the text.")
    if "label" in task.train.column_names:
        name_labels(task)
        task.apply(lambda data, split: data.rename_column("label", "target"))
    if named is not None and not (isinstance(named, list) and all(isinstance(label, str) for label in named)):
        raise ValueError(f"The task {task.name!r} has labels={named!r}: expected a list of texts.")
    known = named or sorted(task.train.unique("target"))
    unknown = sorted({label for data in (task.train, task.validation) for label in data.unique("target")} - set(known))
    if named and unknown:
        raise ValueError(
            f"The data of the task {task.name!r} has the label(s) {', '.join(map(repr, unknown[:20]))}, which are not "
            f"among its 'labels': {', '.join(map(repr, known))}."
        )
    if samples_per_label is not None:
        task.train = first_of_each(task.train, samples_per_label)
    prompt = prompt.replace("{labels}", ", ".join(known)) if "{labels}" in prompt else prompt
    task.apply(
        lambda data, split: data.map(lambda text: {"text": prompt.replace("{text}", text)}, input_columns="text")
    )


def first_of_each(data: Dataset, count: int) -> Dataset:
    """The first `count` rows of each target, in the order of the data."""
    seen: Counter[str] = Counter()
    kept = []
    for row, target in enumerate(data["target"]):
        seen[target] += 1
        if seen[target] <= count:
            kept.append(row)
    return data.select(kept)


@dataclass
class ExactMatch:
    """`compute_metrics`: the share of answers that are right, letter by letter but for blanks around them."""

    tokenizer: Any

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        answers, targets = self._texts(prediction.predictions), self._texts(prediction.label_ids)
        return {"accuracy": float(np.mean([a == b for a, b in zip(answers, targets, strict=True)]))}

    def _texts(self, tokens: np.ndarray) -> list[str]:
        tokens = np.where(tokens < 0, self.tokenizer.pad_token_id, tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def main() -> None:
    model_args, data_args, training_args, eblora_config = parse_arguments(
        ModelArguments, TextArguments, Seq2SeqTrainingArguments
    )
    tasks = load_tasks(data_args, forms=[("text", "label"), ("text", "target")], options=["prompt", "labels"])
    with training_args.main_process_first():
        for task in tasks:
            as_questions(task, data_args.samples_per_label)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)

    def encode(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], max_length=data_args.max_source_length, truncation=True)
        targets = tokenizer(text_target=batch["target"], max_length=data_args.max_target_length, truncation=True)
        return {**encoded, "labels": targets["input_ids"]}

    with training_args.main_process_first():
        for task in tasks:
            task.apply(lambda data, split: data.map(encode, batched=True, remove_columns=data.column_names))
    training_args.predict_with_generate = True
    training_args.generation_max_length = data_args.max_target_length + 1  # with the token that starts it

    model = AutoModelForSeq2SeqLM.from_pretrained(name, **model_args.loading)
    trainer = ContinualEBLoRASeq2SeqTrainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        train_dataset=as_sequence(tasks),
        processing_class=tokenizer,
        compute_metrics=ExactMatch(tokenizer),
        peft_config=model_args.lora_config(task_type="SEQ_2_SEQ_LM"),
        eblora_config=eblora_config,
        sequence=data_args.sequence,
    )
    learn(trainer, zero_shot=data_args.zero_shot)


if __name__ == "__main__":
    main()
