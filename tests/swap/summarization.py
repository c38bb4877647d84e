"""A plain summarisation script: T5 from config, `Seq2SeqTrainer` with generation. The test swaps the import."""

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

folder = Path(sys.argv[1])
words = [
    "<pad>",
    "<unk>",
    "</s>",
    *["the", "cat", "sat", "on", "a", "mat", "and", "then", "dog", "ran", "to", "house"],
]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")

texts = ["the cat sat on the mat and then ran", "a dog ran to the house and sat", "the dog sat on a cat"] * 12
summaries = ["cat sat", "dog ran", "dog sat"] * 12


def tokenize(rows):
    inputs = tokenizer([text + " </s>" for text in rows["text"]])
    labels = tokenizer([summary + " </s>" for summary in rows["summary"]])
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "labels": labels["input_ids"],
    }


data = Dataset.from_dict({"text": texts, "summary": summaries})
data = data.map(tokenize, batched=True, remove_columns=data.column_names)

set_seed(0)
config = T5Config(
    vocab_size=len(words),
    d_model=32,
    d_kv=16,
    d_ff=64,
    num_layers=2,
    num_heads=2,
    eos_token_id=2,
    decoder_start_token_id=0,
)
model = T5ForConditionalGeneration(config)


def compute_metrics(prediction):
    """Unigram F1 of the generated summaries."""
    scores = []
    for made, wanted in zip(prediction.predictions, prediction.label_ids, strict=True):
        made, wanted = (set(tokens[tokens > 2].tolist()) for tokens in (made, wanted))
        scores.append(2 * len(made & wanted) / max(len(made) + len(wanted), 1))
    return {"rouge1": float(np.mean(scores))}


lora_config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"])
trainer = Seq2SeqTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(
        output_dir=str(folder / "out"),
        learning_rate=2e-3,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        predict_with_generate=True,
        generation_max_length=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="rouge1",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=data,
    eval_dataset=data.select(range(6)),
    processing_class=tokenizer,
    data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    compute_metrics=compute_metrics,
)
trainer.train()
trainer.save_model()
trainer.log_metrics("eval", trainer.evaluate())
np.save(folder / "logits.npy", trainer.predict(data.select(range(6))).predictions)
