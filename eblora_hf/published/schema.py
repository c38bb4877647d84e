"""What the JSON files of a sequence may say: each is read through this, wherever it comes from."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from .files import check_no_pointer

MAX_TASKS = 1000  # their ranks add up in the root, so that far fewer fill any model
_MEBIBYTE = 1 << 20
MAX_INDEX, MAX_JSON = 16 * _MEBIBYTE, 4 * _MEBIBYTE  # bytes; an index has some 2 kB a task

Content = TypeVar("Content")

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?$")]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[\w-]+(\.[\w-]+)*$", max_length=500)]
FileName = Annotated[str, StringConstraints(pattern=r"^\.?[\w +-][\w. +-]*(/\.?[\w +-][\w. +-]*)*$", max_length=500)]
RepoId = Annotated[str, StringConstraints(pattern=r"^([\w-][\w.-]*/)?[\w-][\w.-]*$", max_length=200)]
Revision = Annotated[str, StringConstraints(pattern=r"^[\w-][\w./-]*$", max_length=200)]
ClassName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$", max_length=200)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[
    str, StringConstraints(pattern=r"^[\w.+/-]*( [\w.+/-]+)*$", max_length=200)
]  # neither Markdown nor HTML
Text = Annotated[str, StringConstraints(max_length=500)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=0, lt=1 << 48)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Options = dict[Word, bool | int | Number | Word | None]

_CLOSED: Any = ConfigDict(strict=True, extra="forbid")
_OPEN: Any = ConfigDict(strict=True, extra="ignore")


@with_config(_OPEN)
class Version(TypedDict):
    """Of a format; all else in the file depends on it."""

    format_version: Annotated[int, Field(ge=1)]


@with_config(_CLOSED)
class BaseModelIdentity(TypedDict):
    """Which model a sequence was learnt on, as [`describe_base_model`] says it."""

    name_or_path: RepoId | Literal[""]
    revision: Revision | None
    architecture: ClassName
    num_labels: Count | None
    heads: NotRequired[Annotated[list[ModuleName], Field(max_length=100)]]
    label_layer: NotRequired[ModuleName]
    fingerprint: Digest
    weights: Digest | None


@with_config(_OPEN)
class Captured(TypedDict, total=False):
    """What share of a task's energy the bases hold, on average over the layers and in the worst."""

    captured: Share
    captured_least: Share
    columns: Count
    layers_capped: Count
    layers: Count


@with_config(_OPEN)
class AnchorRows(TypedDict, total=False):
    """To which rows a task's training held the model's answers: how many, and the sha256 of their inputs."""

    kind: Literal["rows", "random"]
    rows: Count
    sha256: Digest


@with_config(_OPEN)
class TrainingRecord(TypedDict, total=False):
    """How a task was trained: what a card shows of `training.json`. Further fields are for readers of the file."""

    eblora_config: Options
    task: Options
    learning_rate: Number
    optim: Word
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
    versions: dict[Word, Word]
    metric: Word  # of the row in the index
    bases: Captured
    anchor: AnchorRows


@with_config(_CLOSED)
class OwnerSettings(TypedDict, total=False):
    """What is kept beside a sequence and never pushed."""

    bases: dict[RepoId, RepoId]
    base_model: Annotated[str, StringConstraints(max_length=5000)]
    companions: Annotated[list[FileName], Field(max_length=1000)]


class AdapterFile(BaseModel):
    """
    What is believed of an `adapter_config.json`. How the adapter is built is read from its tensors.

    Of the options with which an update would be more, or other, than γ B A, none may be set.
    """

    model_config = _OPEN
    peft_type: Literal["LORA"]
    task_type: (
        Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"] | None
    ) = None
    modules_to_save: Annotated[list[ModuleName], Field(max_length=100)] | None = None
    target_modules: list[Any] | str | None = None
    exclude_modules: Any = None
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Number = 8.0
    use_rslora: bool = False
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(max_length=10_000)] | None = None
    alpha_pattern: Annotated[dict[str, Number], Field(max_length=10_000)] | None = None
    bias: Literal["none"] = "none"
    init_lora_weights: bool | Text | None = True


def as_plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python, which JSON has; all else as it is."""
    return value.item() if hasattr(value, "item") else value


def as_word(text: str) -> str:
    """A text without what would be markup in a card, as `training.json` holds it."""
    return re.sub(r"[^\w.+/-]+", "_", text)[:100]


def checked(schema: Any, data: bytes) -> Any:
    """
    What a schema makes of JSON.

    Raises:
        ValueError: naming the first field that does not fit.
    """
    try:
        return TypeAdapter(schema).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where or 'the whole'}: {first['msg']}, got {_shortened(first['input'])}") from error


def check_training(data: bytes) -> TrainingRecord:
    """The content of a `training.json`. Raises a `ValueError` naming a field that is not what it should be."""
    return checked(TrainingRecord, data)


def check_settings(data: bytes) -> OwnerSettings:
    """What the owner keeps beside a sequence. Raises a `ValueError` naming a field that is not what it should be."""
    return checked(OwnerSettings, data)


def read_checked(path: Path, what: str, limit: int, check: Callable[[bytes], Content]) -> Content:
    """
    Reads a JSON file and checks its content.

    Args:
        path (`Path`): The file.
        what (`str`): What it should be, for the message.
        limit (`int`): Bytes it may have.
        check (`Callable`): Returns what is made of its bytes, or raises a `ValueError`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and what is wrong in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; restore it from a copy.")
    check_no_pointer(path)
    if path.stat().st_size > limit:
        raise ValueError(f"{path} is not a readable {what}: it has more than {limit} bytes.")
    try:
        return check(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a readable {what}: {error!s}.") from error


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
