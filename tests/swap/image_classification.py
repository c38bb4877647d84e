"""A plain image-classification script: ViT from config on real handwritten digits. The test swaps the import."""

import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from sklearn.datasets import load_digits
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

folder = Path(sys.argv[1])
digits = load_digits()
data = Dataset.from_dict({"image": digits.images[:120], "labels": digits.target[:120]})


def transform(rows):
    pixels = (torch.tensor(rows["image"], dtype=torch.float32) / 8.0 - 1.0).unsqueeze(1)
    return {"pixel_values": list(pixels), "labels": rows["labels"]}


data = data.train_test_split(24, seed=0).with_transform(transform)

set_seed(0)
config = ViTConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=10,
)
model = ViTForImageClassification(config)


def collate(rows):
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


lora_config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(folder / "out"),
        remove_unused_columns=False,
        learning_rate=2e-3,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
    ),
    data_collator=collate,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    compute_metrics=compute_metrics,
)
trainer.train()
trainer.save_model()
trainer.log_metrics("eval", trainer.evaluate())
np.save(folder / "logits.npy", trainer.predict(data["test"]).predictions)
