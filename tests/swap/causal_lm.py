"""A plain causal-LM script: a tiny Llama from config on a list of sentences. The test swaps the import."""

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

folder = Path(sys.argv[1])
words = ["<pad>", "<unk>", "<s>", *["the", "cat", "sat", "on", "a", "mat", "and", "then", "dog", "ran", "to", "house"]]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>")

sentences = ["the cat sat on the mat", "a dog ran to the house", "the dog sat on a cat and then ran"] * 16
data = Dataset.from_dict({"text": sentences}).map(
    lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text"
)

set_seed(0)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
model = LlamaForCausalLM(config)

lora_config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(folder / "out"),
        learning_rate=2e-4,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=data,
    eval_dataset=data.select(range(6)),
    processing_class=tokenizer,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()
print("perplexity", np.exp(trainer.evaluate()["eval_loss"]))
np.save(folder / "logits.npy", trainer.predict(data.select(range(6))).predictions)
