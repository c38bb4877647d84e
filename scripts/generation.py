"""Evaluation by generation: a model answers the test questions of a task greedily, and the task's rule scores it."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import read_file
from common import TaskData
from scorers import SCORERS, caption_scores, check_captions
from transformers import EvalPrediction
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from eblora_hf import ContinualEBLoRATrainer

logger = logging.get_logger(__name__)

OTHER = "other"  # in `test_suffix`, for answers that it does not name
CAPTION = "caption"  # the rule whose scores are of a whole set
RULES = (*SCORERS, CAPTION)


@dataclass
class Question:
    """
    What an answer is scored by.

    Args:
        scorer (`str`): One of [`RULES`].
        record (`dict`): The row of the test file: `image`, `text` and, but for captions, `answer`.
        references (`list[str]`): For a caption, what people wrote.
    """

    scorer: str
    record: dict[str, Any]
    references: list[str]


def ask(task: TaskData, questions: list[Question], root: Path) -> None:
    """
    Makes the test questions of a task with a `scorer`: their text with its suffix, and what answers are scored by,
    which is added to `questions`. A test file without answers is left out, with a word.
    """
    scorer, suffix, data = task.options["scorer"], task.options.get("test_suffix", ""), task.validation
    if scorer not in RULES:
        raise ValueError(f"The task {task.name!r} has scorer={scorer!r}: expected one of {', '.join(RULES)}.")
    if "text" not in data.column_names:
        raise ValueError(f"The task {task.name!r} has a scorer, so that its test data needs the column 'text'.")
    references: list[list[str]] = [[] for _ in range(len(data))]
    if scorer == CAPTION:
        references = read_references(task, root)
    elif "answer" not in data.column_names:
        logger.warning(f"The test data of the task {task.name!r} has no column 'answer': the task is not measured.")
        task.validation = None
        return
    suffixes = suffix if isinstance(suffix, dict) else {OTHER: suffix}
    if not all(isinstance(text, str) for pair in suffixes.items() for text in pair):
        raise ValueError(
            f"The task {task.name!r} has test_suffix={suffix!r}: expected a text, or a mapping from answers to texts; "
            "YAML takes an unquoted Yes or No for a truth value."
        )
    first = len(questions)
    questions += [Question(scorer, record, texts) for record, texts in zip(data, references, strict=True)]
    asked = [
        record["text"] + suffixes.get(record.get("answer"), suffixes.get(OTHER, ""))
        for record in (question.record for question in questions[first:])
    ]
    data = data.select_columns([name for name in ("image", "length") if name in data.column_names]).add_column(
        "text", asked
    )
    task.validation = data.add_column("question", list(range(first, len(questions))))


def read_references(task: TaskData, root: Path) -> list[list[str]]:
    """What people wrote of each picture, from a file as of COCO: `image_id` counts the test rows, from 1 on."""
    if "references" not in task.options:
        raise ValueError(f"The task {task.name!r} is scored as captions: name the file of its 'references'.")
    path = root / task.options["references"]
    written: dict[int, list[str]] = defaultdict(list)
    for entry in read_file(path, "file of references", dict).get("annotations", ()):
        written[entry["image_id"]].append(entry["caption"])
    missing = [number for number in range(1, len(task.validation) + 1) if not written[number]]
    if missing:
        raise ValueError(
            f"{path} has no caption for {len(missing)} of the {len(task.validation)} test rows of the task "
            f"{task.name!r}, row {missing[0]} for one: `image_id` counts them from 1 on."
        )
    return [written[number] for number in range(1, len(task.validation) + 1)]


class AnswerScores:
    """
    `compute_metrics` of generated answers: `score`, and for captions also the seven scores that it is the mean of.

    Args:
        tokenizer: Turns tokens into answers.
        questions (`list[Question]`): Of all tasks; an evaluation set has their positions in it as its labels.
    """

    def __init__(self, tokenizer: Any, questions: list[Question]):
        self._tokenizer, self._questions = tokenizer, questions
        if any(question.scorer == CAPTION for question in questions):
            check_captions()

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        tokens = np.where(prediction.predictions < 0, self._tokenizer.pad_token_id, prediction.predictions)
        answers = [text.strip() for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        questions = [self._questions[position] for position in prediction.label_ids]
        if questions[0].scorer == CAPTION:
            scores = caption_scores(answers, [question.references for question in questions])
            return {"score": scores.pop("mean"), **scores}
        right = [
            SCORERS[question.scorer](answer, question.record["answer"], question.record)
            for answer, question in zip(answers, questions, strict=True)
        ]
        return {"score": sum(right) / len(right)}


class AnsweringTrainer(ContinualEBLoRATrainer):
    """
    The continual trainer whose predictions for a batch with `questions` are the tokens of the answers.

    Args:
        max_new_tokens (`int`): Of an answer, at most.
    """

    def __init__(self, *args: Any, max_new_tokens: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_new_tokens = max_new_tokens

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        if "questions" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self.keep_switched()
        inputs = dict(self._prepare_inputs(inputs))
        questions = inputs.pop("questions")
        with torch.no_grad(), self.accelerator.autocast():
            tokens = self.accelerator.unwrap_model(model).generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self._max_new_tokens,
                pad_token_id=self.processing_class.tokenizer.pad_token_id,
                synced_gpus=is_fsdp_managed_module(model),
            )
        return None, tokens[:, inputs["input_ids"].shape[1] :].contiguous(), questions
