# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["eblora-hf", "datasets>=4", "pyyaml"]
#
# [tool.uv.sources]
# eblora-hf = { path = ".." }
# ///
"""
Tunes a language model on instruction data, task after task, with the loss on the answers alone.

A task's data has one of three forms, told by its columns:

- `messages`: conversations, written with the tokenizer's chat template; every assistant turn is an answer;
- `prompt` and `completion`: plain text, taken as it is;
- `instruction`, `output` and perhaps `input`: plain text, with an empty line between the parts.

`accuracy` is the share of right tokens in the answers. scripts/README.md explains the list of tasks.

    python scripts/run_clm.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --tasks tasks.yaml --output_dir out \\
        --num_train_epochs 1 --learning_rate 2e-4 --per_device_train_batch_size 8 --bf16

    python scripts/run_clm.py arguments.yaml  # the same names in a file
"""

from dataclasses import dataclass, field

from answers import IGNORED, answer_accuracy, encode_answers, render_conversation
from arguments import DataArguments, ModelArguments, parse_arguments
from common import as_sequence, largest, learn, load_tasks
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from eblora_hf import ContinualEBLoRATrainer

FORMS = [("messages",), ("prompt", "completion"), ("instruction", "output")]


@dataclass
class InstructionArguments(DataArguments):
    max_length: int = field(
        default=1024, metadata={"help": "Longer texts are cut; those cut before an answer are dropped."}
    )


def main() -> None:
    model_args, data_args, training_args, eblora_config = parse_arguments(ModelArguments, InstructionArguments)
    tasks = load_tasks(data_args, forms=FORMS, optional_columns=["input"])

    name, revision = model_args.model_name_or_path, model_args.model_revision
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def tokenize(record: dict) -> dict:
        if "messages" in record:
            text, spans = render_conversation(tokenizer, record["messages"])
        else:
            if "prompt" in record:
                prompt, answer = record["prompt"], record["completion"]
            else:
                parts = [record["instruction"], record.get("input"), ""]
                prompt, answer = "\n\n".join(part for part in parts if part is not None), record["output"]
            text = prompt + answer + tokenizer.eos_token
            spans = [(len(prompt), len(text))]
        return encode_answers(tokenizer, text, spans, truncation=True, max_length=data_args.max_length)

    with training_args.main_process_first():
        for task in tasks:

            def encode(data: Dataset, split: str, name: str = task.name) -> Dataset:
                encoded = data.map(tokenize, remove_columns=data.column_names, desc=f"Tokenize {split} of {name}")
                kept = encoded.filter(lambda labels: any(label != IGNORED for label in labels), input_columns="labels")
                if len(kept) == 0:
                    raise ValueError(
                        f"No {split} text of the task {name!r} holds an answer within max_length="
                        f"{data_args.max_length} tokens."
                    )
                return kept

            task.apply(encode)

    trainer = ContinualEBLoRATrainer(
        model=AutoModelForCausalLM.from_pretrained(name, **model_args.loading),
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=as_sequence(tasks),
        processing_class=tokenizer,
        compute_metrics=answer_accuracy,
        preprocess_logits_for_metrics=largest,
        peft_config=model_args.lora_config(task_type="CAUSAL_LM"),
        eblora_config=eblora_config,
        sequence=data_args.sequence,
    )
    learn(trainer, zero_shot=data_args.zero_shot)


if __name__ == "__main__":
    main()
