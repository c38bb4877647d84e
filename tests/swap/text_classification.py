"""A plain text-classification script: BERT from config, CSV files, `Trainer`. The test swaps the import."""

import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

folder = Path(sys.argv[1])
words = ["[PAD]", "[UNK]", "good", "bad", "fine", "awful", "film", "book", "the", "was", "very"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")

files = {"train": str(folder / "train.csv"), "validation": str(folder / "validation.csv")}
data = load_dataset("csv", data_files=files, cache_dir=str(folder / "cache"))
data = data.map(lambda rows: tokenizer(rows["text"]), batched=True)

set_seed(0)
config = BertConfig(
    vocab_size=len(words),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=2,
)
model = BertForSequenceClassification(config)


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


lora_config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(folder / "out"),
        learning_rate=2e-4,
        num_train_epochs=5,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=data["train"],
    eval_dataset=data["validation"],
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=compute_metrics,
)
result = trainer.train()
trainer.save_model()
trainer.log_metrics("train", result.metrics)
trainer.save_metrics("train", result.metrics)
trainer.save_state()
metrics = trainer.evaluate()
trainer.log_metrics("eval", metrics)
np.save(folder / "logits.npy", trainer.predict(data["validation"]).predictions)
