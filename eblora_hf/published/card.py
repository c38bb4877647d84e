"""The model card of a published sequence, from the template in `model_cards/`."""

import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from ..adapters.states import heads_of
from ..metrics import FORMULAS, accuracy_matrix, continual_metrics, unmeasured
from .index import root_rows
from .schema import TrainingRecord, as_word
from .sequence import PublishedSequence

_TASK_TYPES = {  # endings of transformers' class names, for the evaluation results
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def render_card(sequence: PublishedSequence, repo_id: str, licence: str | None = None) -> str:
    """
    Text of `README.md` for a sequence: tasks, use, evaluation, training. No data rows and no local paths.

    Args:
        sequence ([`PublishedSequence`]): The sequence, with at least one task.
        repo_id (`str`): Where it is, or will be; used in the loading code.
        licence (`str`, *optional*): Identifier of a licence; without one the card asks for it.

    Returns:
        `str`: Metadata in YAML, then Markdown.
    """
    base = sequence.base_model
    matrix = accuracy_matrix(sequence.names, root_rows(sequence.tasks, sequence.heads))
    own = accuracy_matrix(sequence.names, [task.metrics for task in sequence.tasks])
    measured = not math.isnan(matrix[-1][-1])
    differs = sequence.heads == "per-task" or not np.array_equal(own, matrix, equal_nan=True)
    of = own if sequence.heads == "per-task" else matrix
    metrics = {name: value for name, value in continual_metrics(of).items() if not math.isnan(value)}
    records = sequence.training()
    metric = records[-1].get("metric", "accuracy")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_template("sequence.md.jinja")).render(
        metadata=_metadata(sequence, repo_id, licence, metric).to_yaml(),
        title=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        base_name=base["name_or_path"] or f"a {base['architecture']}",
        base_is_public=bool(base["name_or_path"]),
        tasks=sequence.tasks,
        tags=[f"task-{index:02d}-{task.name}" for index, task in enumerate(sequence.tasks)],
        loading=loading_code(sequence, repo_id),
        has_heads=bool(heads_of(sequence.adapters([sequence.names[-1]])[0])),
        matrix=_cells(matrix) if measured and sequence.heads != "per-task" else None,
        own_matrix=_cells(own) if measured and differs else None,
        labels=[", ".join(map(as_word, task.labels or [])) for task in sequence.tasks],
        heads=sequence.heads,
        metrics=[(name, f"{value:.4g}", FORMULAS[name]) for name, value in metrics.items()],
        metric=metric,
        left_out=unmeasured(sequence.names, of),
        training=[_training_row(task.name, record) for task, record in zip(sequence.tasks, records, strict=True)],
        versions=", ".join(f"{name} {number}" for name, number in records[-1].get("versions", {}).items())
        or "not stated",
        bases=sequence.bases_at,
        held=[_held_row(task.name, record) for task, record in zip(sequence.tasks, records, strict=True)],
        licence_text=f"`{licence}`" if licence else "Not stated. **Please fill in `license`.**",
    )


def _cells(matrix: np.ndarray) -> list[list[str]]:
    return [[f"{value:.4g}" for value in row] for row in matrix]


def _template(name: str) -> str:
    """A template of the wheel, or of `model_cards/` in a source tree."""
    packaged = Path(__file__).parents[1] / "model_cards" / name
    return (packaged if packaged.is_file() else Path(__file__).parents[2] / "model_cards" / name).read_text("utf-8")


def loading_code(sequence: PublishedSequence, repo_id: str) -> str:
    """The lines that load the sequence with plain PEFT."""
    base = sequence.base_model
    name = base["name_or_path"] or "the/base-model"
    options = f", revision={base['revision']!r}" if base["revision"] else ""
    labels = base["num_labels"] if sequence.heads == "shared" else len(sequence.labels_of_head(sequence.names[-1]))
    options += f", num_labels={labels}" if labels else ""
    options += ", ignore_mismatched_sizes=True" if sequence.heads != "shared" else ""
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {base['architecture']}",
            "",
            f"base_model = {base['architecture']}.from_pretrained({name!r}{options})",
            f"model = PeftModel.from_pretrained(base_model, {repo_id!r})",
        ]
    )


def _metadata(sequence: PublishedSequence, repo_id: str, licence: str | None, metric: str) -> ModelCardData:
    base, last = sequence.base_model, sequence.tasks[-1]
    measured = root_rows(sequence.tasks, sequence.heads)[-1]
    ending = next((kind for end, kind in _TASK_TYPES.items() if base["architecture"].endswith(end)), "other")
    results = [
        EvalResult(
            task_type=ending,
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_name=f"after {last.name}",
            metric_value=measured[name],
        )
        for name in sequence.names
        if name in measured
    ]
    return ModelCardData(
        base_model=base["name_or_path"] or None,
        library_name="peft",
        license=licence,
        tags=["continual-learning", "eblora", "lora"],
        pipeline_tag=None if ending == "other" else ending,
        model_name=repo_id.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def _held_row(name: str, record: TrainingRecord) -> dict[str, Any] | None:
    """What the bases hold of a task, where its record says so."""
    held = record.get("bases")
    if held is None or not {"columns", "captured", "captured_least"} <= set(held):
        return None
    shares = {key: f"{held[key]:.1%}" for key in ("captured", "captured_least")}  # type: ignore[literal-required]
    return {"name": name, "columns": held["columns"]} | shares


def _training_row(name: str, record: TrainingRecord) -> dict[str, Any]:
    config = record.get("eblora_config", {})
    options = {key: value for key, value in config.items() if key != "method"} | record.get("task", {})
    if anchor := record.get("anchor"):
        options["anchor"] = f"{anchor['rows']} rows" if "rows" in anchor else "random"
    return {
        "name": name,
        "method": config.get("method", "not stated"),
        "options": ", ".join(f"{key}={value}" for key, value in options.items()) or "none",
        **{key: record.get(key, "not stated") for key in ("learning_rate", "optim", "seed")},
    }
