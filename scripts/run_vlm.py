# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["eblora-hf", "datasets>=4", "pillow", "pyyaml"]
#
# [tool.uv.sources]
# eblora-hf = { path = ".." }
# ///
"""
Tunes a vision-language model of the LLaVA kind on image instructions, task after task, with the loss on the answers
alone. LoRA is on the language model; the vision tower stays as it is.

A task's data is in the form of LLaVA: `image`, the path of a file, and `conversations`, a list of turns
`{from: human or gpt, value: …}` with `<image>` where the image goes. Test data may have `text` and `answer` instead,
as in UCIT and MLLM-DCL. Image paths start from the task's `image_dir`. scripts/README.md explains the list of tasks.

`accuracy` is the share of right tokens in the answers, `exact_match` that of answers right in every token; choose what
fills the accuracy matrix with `metric_for_best_model`.

    python scripts/run_vlm.py scripts/configs/ucit.yaml  # after naming the folder of the data in it
    torchrun --nproc_per_node 4 scripts/run_vlm.py scripts/configs/mllm-dcl.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from answers import IGNORED, answer_accuracy, encode_answers, render_conversation
from common import (
    DataArguments,
    ModelArguments,
    as_sequence,
    largest,
    learn,
    load_tasks,
    parse_arguments,
)
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from eblora_hf import ContinualEBLoRATrainer

ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class VisionLanguageArguments(ModelArguments):
    lora_target_modules: str = field(
        default=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        metadata={"help": "Regular expression that the whole name of a layer has to match."},
    )
    train_projector: bool = field(
        default=False,
        metadata={"help": "Train `multi_modal_projector` too; it is not protected from later tasks."},
    )


def as_messages(record: dict) -> list[dict]:
    """The conversation of a record in the form of chat templates."""
    if "conversations" in record:
        turns = [(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
    else:
        turns = [("user", f"<image>\n{record['text']}"), ("assistant", record["answer"])]
    messages = []
    for role, value in turns:
        content = [{"type": "text", "text": value.replace("<image>", "").strip()}]
        messages.append({"role": role, "content": [{"type": "image"}] * ("<image>" in value) + content})
    return messages


@dataclass
class AnswerCollator:
    """Reads the images of a batch of records and encodes it, with labels on the answers alone."""

    processor: Any

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        texts, rows = [], []
        for record in records:
            text, spans = render_conversation(self.processor, as_messages(record))
            texts.append(text)
            rows.append(encode_answers(self.processor.tokenizer, text, spans))
        bos = self.processor.tokenizer.bos_token
        batch = self.processor(
            images=[Image.open(record["image"]).convert("RGB") for record in records],
            text=texts,
            padding=True,
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for i, row in enumerate(rows):
            positions = batch["attention_mask"][i].nonzero().squeeze(1)
            # the processor puts many tokens where <image> was; from there to the end all are the same
            answers = torch.tensor(row["labels"][-len(positions) :])
            labels[i, positions[-len(answers) :]] = answers
            answered = labels[i] != IGNORED
            if not torch.equal(labels[i][answered], batch["input_ids"][i][answered]):
                raise ValueError(f"Expected the image before every answer, got {texts[i]!r}.")
        return {**batch, "labels": labels}


def with_images(data: Dataset, split: str, task: str, folder: Path) -> Dataset:
    """The records with whole image paths, checked: every image exists and every turn has a role we know."""
    missing = [path for path in data.unique("image") if not (folder / path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The {split} data of the task {task!r} names {len(missing)} image(s) that are not in {str(folder)!r}, "
            f"{missing[0]!r} for one. Set the task's 'image_dir'."
        )
    for turns in data["conversations"] if "conversations" in data.column_names else ():
        roles = [turn["from"] for turn in turns]
        if not roles or set(roles) - set(ROLES) or roles[-1] != "gpt":
            raise ValueError(
                f"The {split} data of the task {task!r} has a conversation between {roles}: expected turns from "
                "'human' and 'gpt', the last one from 'gpt'."
            )
    return data.map(lambda path: {"image": str(folder / path)}, input_columns="image")


def main() -> None:
    model_args, data_args, training_args, eblora_config = parse_arguments(VisionLanguageArguments, DataArguments)
    forms = [("image", "conversations"), ("image", "text", "answer")]
    tasks = load_tasks(data_args, forms=forms, options=["image_dir"])
    with training_args.main_process_first():
        for task in tasks:
            folder = Path(data_args.data_dir) / task.options.get("image_dir", ".")
            task.apply(lambda data, split, task=task, folder=folder: with_images(data, split, task.name, folder))

    name, revision = model_args.model_name_or_path, model_args.model_revision
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    training_args.remove_unused_columns = False  # the collator reads the records
    model = AutoModelForImageTextToText.from_pretrained(name, **model_args.loading)
    # metrics need the logits alone, and a Trainer cannot gather what the vision tower adds
    model.config.keys_to_ignore_at_inference = ["cache", "past_key_values", "image_hidden_states", "image_outputs"]

    trainer = ContinualEBLoRATrainer(
        model=model,
        args=training_args,
        data_collator=AnswerCollator(processor),
        train_dataset=as_sequence(tasks),
        processing_class=processor,
        compute_metrics=answer_accuracy,
        preprocess_logits_for_metrics=largest,
        peft_config=model_args.lora_config(
            modules_to_save=["multi_modal_projector"] if model_args.train_projector else None
        ),
        eblora_config=eblora_config,
        sequence=data_args.sequence,
    )
    learn(trainer)


if __name__ == "__main__":
    main()
