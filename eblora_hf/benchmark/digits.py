"""The suite of transformed digits: scikit-learn's images and a small ViT that is pre-trained on them upright."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset
from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup, set_seed

from ..published.files import tensor_bytes, write
from .suite import ANCHOR_ROWS, Problem, Suite
from .transformations import Transformation, transformation, warp

SPLITS = {"train": 900, "validation": 360, "test": 537}
PRETRAINING_STEPS = 800


@dataclass(frozen=True)
class Digits:
    """Images `(n, 1, 8, 8)` in [-1, 1] and labels `(n,)` of one split."""

    images: torch.Tensor
    labels: torch.Tensor

    def transformed(self, transform: Transformation) -> "DigitsDataset":
        return DigitsDataset(transform(self.images), self.labels)


class DigitsDataset(TensorDataset):
    """Items `{"pixel_values", "labels"}` as a `Trainer` takes them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:  # type: ignore[override]
        images, labels = super().__getitem__(index)
        return {"pixel_values": images, "labels": labels}


def load_digits(seed: int) -> dict[str, Digits]:
    """
    Splits the 1,797 digits by a seeded permutation into 900 train, 360 validation and 537 test images.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits as load

    data = load()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0  # pixels are 0…16
    labels = torch.tensor(data.target, dtype=torch.long)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    splits, start = {}, 0
    for name, size in SPLITS.items():
        chosen = order[start : start + size]
        splits[name] = Digits(images[chosen], labels[chosen])
        start += size
    return splits


# ---- the base model ----


def new_model() -> ViTForImageClassification:
    """The ViT of the protocol, randomly initialised."""
    config = ViTConfig(  # type: ignore[call-arg]
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Shift by up to a pixel, rotation by up to 0.2 rad, scale by up to 10 %, noise of 0.1."""
    n, pixel = len(images), 2.0 / images.shape[-1]
    angle = 0.4 * torch.rand(n) - 0.2
    scale = 0.9 + 0.2 * torch.rand(n)
    shift = pixel * (2.0 * torch.rand(n, 2) - 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrices = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).reshape(n, 2, 3)
    return warp(images, matrices) + 0.1 * torch.randn_like(images)


def pretrain(seed: int, train: Digits, progress: Callable[[], None] = lambda: None) -> ViTForImageClassification:
    """
    Trains the base model on upright digits: 800 steps of 64, AdamW 3e-3, weight decay 0.01, cosine with 5 % warm-up.

    Args:
        seed (`int`): Seed of the initialisation, the batches and the augmentation.
        train ([`Digits`]): The training split.
        progress (`Callable`): Called after each step.

    Returns:
        `ViTForImageClassification`: With all parameters frozen but none adapted yet; about 98 % accurate.
    """
    set_seed(seed)
    model = new_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, PRETRAINING_STEPS // 20, PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        chosen = torch.randint(len(train.labels), (64,))
        model(pixel_values=augment(train.images[chosen]), labels=train.labels[chosen]).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress()
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def steady_cpu() -> Iterator[None]:
    """
    Runs on one thread, so that results do not depend on the number of cores (tensors this small gain nothing from
    more), and without denormal numbers, on which a CPU is many times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


# ---- the suite ----


def digits_problem(
    model: nn.Module, splits: dict[str, Digits], tasks: Sequence[str], measured_on: str = "test"
) -> Problem:
    """
    Tasks of transformed digits for a model that knows them upright.

    Args:
        model (`nn.Module`): From [`pretrain`].
        splits (`dict[str, Digits]`): From [`load_digits`].
        tasks (`Sequence[str]`): Names of transformations.
        measured_on (`str`, defaults to `"test"`): The split to measure on.
    """
    transforms = {name: transformation(name) for name in tasks}
    upright, labels = splits[measured_on].images, splits[measured_on].labels

    def left(trained: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            right = trained.eval()(pixel_values=upright).logits.argmax(-1) == labels
        return {"base": 100.0 * right.double().mean().item()}

    return Problem(
        model,
        {name: splits["train"].transformed(transform) for name, transform in transforms.items()},
        {name: splits[measured_on].transformed(transform) for name, transform in transforms.items()},
        Subset(splits["train"].transformed(lambda images: images), range(ANCHOR_ROWS)),
        left,
        {},
    )


class DigitsSuite(Suite):
    """Every task is a transformation of the images; all have the one head of the pre-training, which is frozen."""

    settings_of, tuning_seeds, rank, batch_size = "digits", (100, 101), 4, 32

    def check_task(self, name: str) -> None:
        transformation(name)

    def prepare(self, seed: int, folder: Path) -> None:
        path = folder / f"seed-{seed}.safetensors"
        if not path.is_file():
            write(path, tensor_bytes(pretrain(seed, load_digits(seed)["train"]).state_dict()))

    def problem(self, seed: int, folder: Path, tasks: Sequence[str], measured_on: str) -> Problem:
        model, path = new_model(), folder / f"seed-{seed}.safetensors"
        try:
            model.load_state_dict(safetensors.torch.load_file(path))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it.") from error
        return digits_problem(model.eval().requires_grad_(False), load_digits(seed), tasks, measured_on)
