"""Any PEFT LoRA adapter, read from a folder or the Hub with its scaling folded in."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]  # has time-outs, which re has not
from huggingface_hub import file_exists, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig

from ..adapters.states import AdapterState, factor_key, factors_of, in_full
from .adapter_files import check_factors, config_of, read_adapter_file, read_tensors, readable_targets
from .index import ADAPTER, ADAPTER_CONFIG
from .schema import AdapterFile

_PICKLE = "adapter_model.bin"
_PATIENCE = 10.0  # seconds for the patterns of a configuration, which may come from anywhere
_LONGEST = 1000  # characters of one


@dataclass(frozen=True)
class Adapter:
    """
    A LoRA adapter.

    Args:
        source (`str`): Where it was read.
        config (`peft.LoraConfig`): Its configuration as published.
        state (`dict[str, torch.Tensor]`): Its tensors by PEFT's file names, folded: lora_B carries γ, so ΔW = B A.
            The factors are float32 (float64 where they were), whatever they were published in.
    """

    source: str
    config: LoraConfig
    state: AdapterState


def read_adapter(source: str | Path, *, token: str | None = None) -> Adapter:
    """
    Reads any PEFT LoRA adapter and folds its scaling γ (`lora_alpha`, `use_rslora`, `rank_pattern`,
    `alpha_pattern`) into lora_B.

    Args:
        source (`str` or `Path`): A folder; or on the Hub `"user/repo"`, `"user/repo@revision"`,
            `"user/repo:subfolder"` or `"user/repo@revision:subfolder"`.
        token (`str`, *optional*): For the Hub.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it is not plain LoRA on linear layers, is published as a pickle, or its files contradict each
            other; the message says which.
    """
    folder, pickled = _fetch(str(source), token)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{source} holds no adapter: there is no {ADAPTER_CONFIG} in it.")
    file = read_adapter_file(folder / ADAPTER_CONFIG)
    if pickled:
        raise ValueError(
            f"{source} has its weights in {_PICKLE}, a pickle, which can run code when it is read. Load it with PEFT "
            "where you trust it, and save it again with `save_pretrained` to get safetensors."
        )
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"{source} has a configuration but no weights: there is no {ADAPTER} in it.")
    state = read_tensors(folder / ADAPTER)
    check_factors(state, source)
    config = readable_targets(config_of(file, state), file)
    return Adapter(str(source), config, _folded(state, file, source))


def _fetch(source: str, token: str | None) -> tuple[Path, bool]:
    """The folder of an adapter, downloaded if it is on the Hub, and whether its weights are a pickle alone."""
    if Path(source).is_dir():
        folder = Path(source)
        return folder, (folder / _PICKLE).is_file() and not (folder / ADAPTER).is_file()
    parts = re.fullmatch(r"(?P<repo>[\w-][\w.-]*(/[\w.-]+)?)(@(?P<revision>[^:]+))?(:(?P<subfolder>.+))?", source)
    if parts is None:
        raise FileNotFoundError(f"{source} is neither a folder nor of the form user/repo[@revision][:subfolder].")
    repo, revision = parts["repo"], parts["revision"]
    prefix = f"{parts['subfolder'].strip('/')}/" if parts["subfolder"] else ""
    wanted = [f"{prefix}{name}" for name in (ADAPTER_CONFIG, ADAPTER)]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, token=token)) / prefix
        missing = not (folder / ADAPTER).is_file()
        return folder, missing and file_exists(repo, f"{prefix}{_PICKLE}", revision=revision, token=token)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source} is neither a folder nor a repository on the Hub that you can read."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{source} is not a folder, and the Hub could not be asked for it: {error}") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision {revision!r} on the Hub.") from error


def _folded(state: AdapterState, file: AdapterFile, source: str | Path) -> AdapterState:
    """The state with γ in lora_B. Raises a `ValueError` if its ranks are not those of the configuration."""
    lora_a, lora_b = factors_of(state, "lora_A"), factors_of(state, "lora_B")
    ranks = _by_layer(file.rank_pattern or {}, list(lora_a), file.r, source)
    alphas = _by_layer(file.alpha_pattern or {}, list(lora_a), file.lora_alpha, source)
    folded = dict(state)
    for name, a in lora_a.items():
        b, rank = lora_b[name], ranks[name]
        if a.shape[0] != rank:
            raise ValueError(
                f"{source}: {name} has factors B {tuple(b.shape)} and A {tuple(a.shape)}, expected (d_out, {rank}) "
                f"and ({rank}, d_in): {rank} is its rank by {ADAPTER_CONFIG}."
            )
        scaling = alphas[name] / rank**0.5 if file.use_rslora else alphas[name] / rank
        folded[factor_key(name, "lora_A")] = in_full(a)
        folded[factor_key(name, "lora_B")] = in_full(b) * scaling
    return folded


def _by_layer(patterns: dict[str, Any], names: list[str], default: Any, source: str | Path) -> dict[str, Any]:
    """
    The value of each layer by PEFT's rule: that of the first pattern which its name, or the end of it, matches.

    Raises:
        ValueError: for what is no regular expression, or takes too long to match.
    """
    exact = {f"^{re.escape(name)}": name for name in names}  # what PEFT itself and this package write
    if patterns.keys() <= exact.keys():
        return dict.fromkeys(names, default) | {exact[pattern]: value for pattern, value in patterns.items()}
    end = time.monotonic() + _PATIENCE
    found = {}
    for name in names:
        found[name] = default
        for pattern, value in patterns.items():
            try:
                remaining = end - time.monotonic()
                if remaining <= 0 or len(pattern) > _LONGEST:
                    raise TimeoutError
                match = regex.match(rf"(.*\.)?({pattern})$", name, timeout=remaining)
            except (regex.error, TimeoutError, RecursionError, MemoryError, OverflowError) as error:
                raise ValueError(
                    f"{source}: the pattern {pattern!r:.80} in {ADAPTER_CONFIG} is no regular expression, or takes "
                    "too long to match."
                ) from error
            if match:
                found[name] = value
                break
    return found
