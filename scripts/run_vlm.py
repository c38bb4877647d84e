# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["eblora-hf[captions]", "datasets>=4", "pillow", "pyyaml"]
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

A task with a `scorer` is evaluated by generation: `score` is what the scorer makes of the answers, which
scripts/README.md lists. Of one without, `accuracy` is the share of right tokens in the answers and `exact_match` that
of answers right in every token. Choose what fills the accuracy matrix with `metric_for_best_model`.

    python scripts/run_vlm.py scripts/configs/ucit.yaml  # after naming the folder of the data in it
    torchrun --nproc_per_node 4 scripts/run_vlm.py scripts/configs/mllm-dcl.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from answers import IGNORED, answer_accuracy, encode_answers, render_conversation
from arguments import DataArguments, ModelArguments, parse_arguments
from common import TaskData, as_sequence, largest, learn, load_tasks
from datasets import Dataset
from generation import AnsweringTrainer, AnswerScores, Question, ask
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaImageProcessor

ROLES = {"human": "user", "gpt": "assistant"}
IMAGE_TOKENS = 128  # that a picture counts for among the words of a record


@dataclass
class VisionLanguageArguments(ModelArguments):
    lora_target_modules: str = field(
        default=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        metadata={"help": "Regular expression that the whole name of a layer has to match."},
    )
    train_projector: bool = field(
        default=False,
        metadata={
            "help": "Train `multi_modal_projector` too, at `head_learning_rate` if that is given; it is not protected "
            "from later tasks."
        },
    )
    chat_template: Optional[str] = field(  # noqa: UP045 - HfArgumentParser needs it on Python 3.10
        default=None,
        metadata={"help": "File of a chat template instead of the model's own; also from the folder of the scripts."},
    )
    system_prompt: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "What a conversation begins with; the chat template has to write it."}
    )
    pad_images: bool = field(
        default=False, metadata={"help": "Pad pictures to squares with the mean colour, instead of cropping them."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Of an answer that is generated, at most."})

    def processor(self) -> Any:
        """
        The processor of the model, with the template and the padding asked for.

        Raises:
            ValueError: if the template leaves out the system prompt, or the images cannot be padded.
        """
        processor = AutoProcessor.from_pretrained(self.model_name_or_path, revision=self.model_revision)
        if self.chat_template is not None:
            paths = [folder / self.chat_template for folder in (Path(), Path(__file__).parent)]
            found = [path for path in paths if path.is_file()]
            if not found:
                raise FileNotFoundError(
                    f"chat_template={self.chat_template!r}: there is no {' and no '.join(map(str, paths))}."
                )
            processor.chat_template = found[0].read_text(encoding="utf-8")
        if self.system_prompt is not None:
            messages = as_messages({"text": "?", "answer": "!"}, self.system_prompt)
            if self.system_prompt not in processor.apply_chat_template(messages, tokenize=False):
                raise ValueError(
                    f"The chat template leaves out system_prompt={self.system_prompt!r}. Name one that writes it with "
                    "--chat_template."
                )
        if self.pad_images:
            processor.image_processor = self._padding(processor.image_processor)
        return processor

    def _padding(self, made: Any) -> LlavaImageProcessor:
        """One that pads, with the settings of the model's own: that of LLaVA 1.5 is saved as CLIP's, which crops."""
        if not type(made).__name__.startswith(("CLIP", "Llava")):
            raise ValueError(
                f"pad_images=True, but {type(made).__name__} is no processor of a model of the LLaVA 1.5 kind, whose "
                "pictures are padded to squares."
            )
        return LlavaImageProcessor.from_pretrained(self.model_name_or_path, revision=self.model_revision, do_pad=True)


def as_messages(record: dict, system_prompt: str | None = None) -> list[dict]:
    """The conversation of a record in the form of chat templates; without an `answer` the question alone."""
    if "conversations" in record:
        turns = [(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
    else:
        turns = [("user", f"<image>\n{record['text']}")]
        turns += [("assistant", record["answer"])] if "answer" in record else []
    messages = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    for role, value in turns:
        content = [{"type": "text", "text": value.replace("<image>", "").strip()}]
        messages.append({"role": role, "content": [{"type": "image"}] * ("<image>" in value) + content})
    return messages


@dataclass
class AnswerCollator:
    """
    Reads the images of a batch of records and encodes it: with labels on the answers alone; or of records with the
    position of their `question`, the prompts, padded on the left.
    """

    processor: Any
    system_prompt: str | None = None

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        if "question" in records[0]:
            return self._questions(records)
        texts, rows = [], []
        for record in records:
            text, spans = render_conversation(self.processor, as_messages(record, self.system_prompt))
            texts.append(text)
            rows.append(encode_answers(self.processor.tokenizer, text, spans))
        batch = self._encode(records, texts)
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

    def _questions(self, records: list[dict]) -> dict[str, torch.Tensor]:
        asked = [as_messages({"text": record["text"]}, self.system_prompt) for record in records]
        texts = [self.processor.apply_chat_template(it, tokenize=False, add_generation_prompt=True) for it in asked]
        batch = self._encode(records, texts, padding_side="left")
        return {**batch, "questions": torch.tensor([record["question"] for record in records])}

    def _encode(self, records: list[dict], texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        bos = self.processor.tokenizer.bos_token
        return self.processor(
            images=[Image.open(record["image"]).convert("RGB") for record in records],
            text=texts,
            padding=True,
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors="pt",
            **options,
        )


def with_images(data: Dataset, split: str, task: TaskData, folder: Path) -> Dataset:
    """The records with whole image paths, checked: every image exists and every turn has a role we know."""
    missing = [path for path in data.unique("image") if not (folder / path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The {split} data of the task {task.name!r} names {len(missing)} image(s) that are not in "
            f"{str(folder)!r}, {missing[0]!r} for one. Set the task's 'image_dir'."
        )
    for turns in data["conversations"] if "conversations" in data.column_names else ():
        roles = [turn["from"] for turn in turns]
        if not roles or set(roles) - set(ROLES) or roles[-1] != "gpt":
            raise ValueError(
                f"The {split} data of the task {task.name!r} has a conversation between {roles}: expected turns from "
                "'human' and 'gpt', the last one from 'gpt'."
            )
    asked = split == "validation" and "scorer" in task.options
    if not asked and not {"conversations", "answer"} & set(data.column_names):
        raise ValueError(
            f"The {split} data of the task {task.name!r} has no column 'answer' beside 'text': only a task with a "
            "'scorer' for captions is evaluated without."
        )
    for column in {"text", "answer"} & set(data.column_names):
        if any(not isinstance(value, str) for value in data[column]):
            raise ValueError(f"The {split} data of the task {task.name!r} has values in {column!r} that are no text.")
    data = data.map(lambda path: {"image": str(folder / path)}, input_columns="image")
    return data.map(lambda record: {"length": count_words(record)})  # for group_by_length


def count_words(record: dict) -> int:
    """Words of a record, by which batches of similar length are made."""
    texts = [turn["value"] for turn in record.get("conversations", ())] or [record["text"], record.get("answer", "")]
    return IMAGE_TOKENS + sum(len(text.split()) for text in texts)


def main() -> None:
    model_args, data_args, training_args, eblora_config = parse_arguments(VisionLanguageArguments, DataArguments)
    forms, root = [("image", "conversations"), ("image", "text")], Path(data_args.data_dir)
    tasks = load_tasks(
        data_args, forms, optional_columns=["answer"], options=["image_dir", "scorer", "test_suffix", "references"]
    )
    questions: list[Question] = []
    with training_args.main_process_first():
        for task in tasks:
            folder = root / task.options.get("image_dir", ".")
            task.apply(lambda data, split, task=task, folder=folder: with_images(data, split, task, folder))
            if "scorer" in task.options:
                ask(task, questions, root)
    if questions and any("scorer" not in task.options for task in tasks):
        raise ValueError("Some tasks have a 'scorer' and others have none: a matrix is of one metric.")

    if questions:
        training_args.metric_for_best_model = training_args.metric_for_best_model or "score"

    processor = model_args.processor()
    training_args.remove_unused_columns = False  # the collator reads the records
    name = model_args.model_name_or_path
    model = AutoModelForImageTextToText.from_pretrained(name, **model_args.loading)
    # metrics need the logits alone, and a Trainer cannot gather what the vision tower adds
    model.config.keys_to_ignore_at_inference = ["cache", "past_key_values", "image_hidden_states", "image_outputs"]

    trainer = AnsweringTrainer(
        model=model,
        args=training_args,
        data_collator=AnswerCollator(processor, model_args.system_prompt),
        train_dataset=as_sequence(tasks),
        processing_class=processor,
        compute_metrics=AnswerScores(processor.tokenizer, questions) if questions else answer_accuracy,
        preprocess_logits_for_metrics=None if questions else largest,
        peft_config=model_args.lora_config(
            modules_to_save=["multi_modal_projector"] if model_args.train_projector else None
        ),
        eblora_config=eblora_config,
        sequence=data_args.sequence,
        max_new_tokens=model_args.max_new_tokens,
    )
    learn(trainer, zero_shot=data_args.zero_shot)


if __name__ == "__main__":
    main()
