# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["eblora-hf", "datasets>=4", "pillow", "pyyaml"]
#
# [tool.uv.sources]
# eblora-hf = { path = ".." }
# ///
"""
Learns image classification tasks one after another, with one head over the labels of all tasks.

A task's data has the columns `image` and `label`: a data set on the Hub, or a folder with an image folder per split
and class (`train/cat/1.png`); scripts/README.md explains the list of tasks.

    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --tasks tasks.yaml --output_dir out --num_train_epochs 5 --learning_rate 1e-3 --per_device_train_batch_size 64

    python scripts/run_image_classification.py arguments.yaml  # the same names in a file
"""

from dataclasses import dataclass, field

from arguments import LabelArguments, ModelArguments, parse_arguments
from common import accuracy, as_sequence, largest, learn, load_tasks, share_labels
from transformers import AutoImageProcessor, AutoModelForImageClassification, default_data_collator

from eblora_hf import ContinualEBLoRATrainer


@dataclass
class ImageModelArguments(ModelArguments):
    head: str = field(default="classifier", metadata={"help": "Name of the model's classifier, which is trained too."})


def main() -> None:
    model_args, data_args, training_args, eblora_config = parse_arguments(ImageModelArguments, LabelArguments)
    tasks = load_tasks(data_args, forms=[("image", "label")])
    head = share_labels(tasks, data_args.labels)

    name, revision = model_args.model_name_or_path, model_args.model_revision
    processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    # a checkpoint with classes of its own gets a new head
    model = AutoModelForImageClassification.from_pretrained(
        name, **model_args.loading, **head, ignore_mismatched_sizes=True
    )

    def load_images(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        return {
            "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
            "labels": batch["labels"],
        }

    for task in tasks:
        task.apply(lambda data, split: data.with_transform(load_images))
    training_args.remove_unused_columns = False  # the transform needs the column `image`

    trainer = ContinualEBLoRATrainer(
        model=model,
        args=training_args,
        data_collator=default_data_collator,
        train_dataset=as_sequence(tasks),
        processing_class=processor,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=largest,
        peft_config=model_args.lora_config(modules_to_save=[model_args.head], exclude_modules=[model_args.head]),
        eblora_config=eblora_config,
        sequence=data_args.sequence,
    )
    learn(trainer, zero_shot=data_args.zero_shot)


if __name__ == "__main__":
    main()
