"""The arguments of the `run_*.py` scripts: flags, or a configuration file with the same names."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.utils import logging

from eblora_hf import EBLoRAConfig


@dataclass
class ModelArguments:
    """The base model and its LoRA adapter."""

    model_name_or_path: str = field(metadata={"help": "The base model: a folder, or an id on the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the base model."})
    dtype: str = field(default="auto", metadata={"help": "Of its weights: 'auto' (as saved), 'float32', 'bfloat16'…"})
    lora_r: int = field(default=16, metadata={"help": "Rank of the update of a task."})
    lora_alpha: int = field(default=32, metadata={"help": "PEFT scales the update by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the inputs of the adapter."})
    lora_target_modules: str = field(
        default="all-linear",
        metadata={"help": "'all-linear', or a regular expression that the whole name of a layer has to match."},
    )

    @property
    def loading(self) -> dict[str, Any]:
        """For `from_pretrained` of the model."""
        return {"revision": self.model_revision, "dtype": self.dtype}

    def lora_config(self, **extra) -> LoraConfig:
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            **extra,
        )


@dataclass
class DataArguments:
    """The tasks in the order they are learnt."""

    tasks: str = field(
        metadata={"help": "YAML or JSON file that lists the tasks; in a configuration file, the list itself."}
    )
    data_dir: str = field(default=".", metadata={"help": "Folder that the paths in the list of tasks start from."})
    sequence: Optional[str] = field(  # noqa: UP045 - HfArgumentParser needs it on Python 3.10
        default=None,
        metadata={"help": "Published sequence to continue: a folder, 'user/repo' or 'user/repo@revision'."},
    )
    total_train_batch_size: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "Samples of an optimizer step over all processes. It sets gradient_accumulation_steps, so that a "
            "run on another number of GPUs is the same run; one that cannot be is refused."
        },
    )
    zero_shot: bool = field(
        default=False,
        metadata={"help": "Evaluate the pre-trained model on all tasks first, into `zero_shot.json`."},
    )


@dataclass
class LabelArguments(DataArguments):
    """The tasks, and the labels of the head they share."""

    labels: Optional[list[str]] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "All labels the head is for; by default those in the tasks' training sets. Name them when later "
            "runs will bring tasks with further labels."
        },
    )


def parse_arguments(
    model_arguments: type = ModelArguments,
    data_arguments: type = DataArguments,
    training_arguments: type = TrainingArguments,
) -> tuple:
    """
    Reads the command line: flags, or the path of one `.yaml` or `.json` file with the same names; and sets the seed.

    Returns:
        `tuple`: The model's arguments, the data's, `TrainingArguments` and [`EBLoRAConfig`].
    """
    parser = HfArgumentParser((model_arguments, data_arguments, training_arguments, EBLoRAConfig))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml", ".json")):
        values = read_file(Path(sys.argv[1]), "configuration file", dict)
        for dataclass_type in parser.dataclass_types:
            for option in dataclasses.fields(dataclass_type):
                if option.type is float and isinstance(values.get(option.name), str):  # YAML reads 2e-4 as text
                    values[option.name] = as_number(f"{sys.argv[1]}: {option.name}", values[option.name])
        parsed = parser.parse_dict(values)
    else:
        parsed = parser.parse_args_into_dataclasses()
    accumulate(parsed[2], parsed[1].total_train_batch_size)
    logging.set_verbosity(parsed[2].get_process_log_level())
    set_seed(parsed[2].seed)
    return parsed


def accumulate(args: TrainingArguments, total: int | None) -> None:
    """
    Sets `gradient_accumulation_steps`, so that a step has so many samples over all processes.

    Raises:
        ValueError: if no number of steps makes that many, or another number is given beside it.
    """
    if total is None:
        return
    at_once = args.train_batch_size * args.world_size
    if total < 1 or total % at_once:
        raise ValueError(
            f"total_train_batch_size={total}: {args.world_size} process(es) with {args.train_batch_size} samples each "
            f"take {at_once} at once, of which {total} is no multiple. Change per_device_train_batch_size, or the "
            "number of processes."
        )
    steps = total // at_once
    if args.gradient_accumulation_steps not in (1, steps):
        raise ValueError(
            f"total_train_batch_size={total} makes {steps} accumulation step(s) of {at_once} samples, and "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} is given as well. Leave one of them out."
        )
    args.gradient_accumulation_steps = steps


def read_file(path: Path, what: str, kind: type) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"The {what} {str(path)!r} does not exist.")
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The {what} {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"The {what} {str(path)!r} must hold a {kind.__name__}, got a {type(content).__name__}.")
    return content


def as_number(what: str, value: Any, kind: type = float) -> float:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is {value!r}: expected a number.") from error
