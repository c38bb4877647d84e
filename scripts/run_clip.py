# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["eblora-hf", "datasets>=4", "pillow", "pyyaml"]
#
# [tool.uv.sources]
# eblora-hf = { path = ".." }
# ///
"""
Teaches CLIP image classification tasks one after another, as in the MTIL benchmark. There is no head: an image belongs
to the class whose text is nearest to it, so that tasks with other classes need no new parameters.

A task's data has the columns `image` and `label`; `prompt` says how a class becomes a text ("a photo of a {}."), and
`class_names` renames classes for it. scripts/README.md explains the list of tasks.

    python scripts/run_clip.py scripts/configs/mtil-order-1.yaml  # after naming the folder of the data in it
    python scripts/run_clip.py --model_name_or_path openai/clip-vit-base-patch16 --tasks tasks.yaml --output_dir out
"""

from dataclasses import dataclass
from typing import Any

import torch
from arguments import DataArguments, ModelArguments, parse_arguments
from common import TaskData, accuracy, as_sequence, index_labels, largest, learn, load_tasks, name_labels
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from eblora_hf import ContinualEBLoRATrainer


def class_texts(task: TaskData) -> list[str]:
    """The text of each class of a task, whose labels become positions in that list."""
    name_labels(task)
    classes = sorted(task.train.unique("label"))
    index_labels(task, classes)
    prompt, renamed = task.options.get("prompt", "a photo of a {}."), task.options.get("class_names", {})
    unknown = sorted(set(renamed) - set(classes))
    if "{}" not in prompt or unknown:
        raise ValueError(
            f"The task {task.name!r} has the prompt {prompt!r}, which needs a {{}} for the class, and renames "
            f"{unknown}; its classes are {', '.join(classes[:20])}."
        )
    return [prompt.replace("{}", renamed.get(label, label.replace("_", " "))) for label in classes]


@dataclass
class ClassTextCollator:
    """Puts the images of one task together with the texts of its classes, `(classes, length)`, once per batch."""

    tokenizer: Any
    texts: dict[str, list[str]]

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(self.texts[items[0]["task"]], padding=True, truncation=True, return_tensors="pt")
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),  # first: its length is the batch's
            "labels": torch.tensor([item["labels"] for item in items]),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }


def nearest_text_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy over the classes, as a mean over the whole batch of an optimizer step."""
    if num_items_in_batch is None:
        return cross_entropy(outputs["logits_per_image"], labels)
    return cross_entropy(outputs["logits_per_image"], labels, reduction="sum") / num_items_in_batch


def main() -> None:
    model_args, data_args, training_args, eblora_config = parse_arguments(ModelArguments, DataArguments)
    tasks = load_tasks(data_args, forms=[("image", "label")], options=["prompt", "class_names"])
    texts = {task.name: class_texts(task) for task in tasks}

    name, revision = model_args.model_name_or_path, model_args.model_revision
    processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)

    for task in tasks:

        def load_images(batch: dict, name: str = task.name) -> dict:
            images = [image.convert("RGB") for image in batch["image"]]
            return {
                "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
                "labels": batch["labels"],
                "task": [name] * len(images),
            }

        task.apply(lambda data, split, load_images=load_images: data.with_transform(load_images))
    training_args.remove_unused_columns = False  # the transform needs the column `image`
    training_args.label_names = ["labels"]  # CLIP's own forward knows no labels

    trainer = ContinualEBLoRATrainer(
        model=CLIPModel.from_pretrained(name, **model_args.loading),
        args=training_args,
        data_collator=ClassTextCollator(tokenizer, texts),
        train_dataset=as_sequence(tasks),
        processing_class=processor,
        compute_loss_func=nearest_text_loss,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=largest,
        peft_config=model_args.lora_config(),
        eblora_config=eblora_config,
        sequence=data_args.sequence,
    )
    learn(trainer, zero_shot=data_args.zero_shot)


if __name__ == "__main__":
    main()
