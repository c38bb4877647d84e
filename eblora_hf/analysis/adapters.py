"""PEFT LoRA adapters as files: read from a folder or the Hub with their scaling folded in, written for stock PEFT."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import file_exists, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..adapters.states import AdapterState, factor_key, factors_of, folded_config, in_full
from ..published.files import tensor_bytes, write
from ..published.index import ADAPTER, ADAPTER_CONFIG

_PICKLE = "adapter_model.bin"
_FACTOR = r"base_model\.model\..+\.lora_[AB]\.weight"
# options with which the update is more, or other, than γ B A on a weight of the base model
_OTHER_UPDATES = {
    "use_dora": "DoRA rescales every row of the weight",
    "lora_bias": "lora_B has a bias",
    "use_qalora": "QALoRA pools the inputs of lora_A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "alora_invocation_tokens": "aLoRA acts on a part of the tokens",
    "arrow_config": "Arrow routes tokens to several adapters",
    "kasa_config": "KaSA changes the base weights",
    "target_parameters": "its factors belong to bare parameters, not to linear layers",
    "layer_replication": "several adapters share one weight",
    "trainable_token_indices": "trained token embeddings are not a LoRA update",
}
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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


def read_adapter(source: str | Path) -> Adapter:
    """
    Reads any PEFT LoRA adapter and folds its scaling γ (`lora_alpha`, `use_rslora`, `rank_pattern`,
    `alpha_pattern`) into lora_B.

    Args:
        source (`str` or `Path`): A folder; or on the Hub `"user/repo"`, `"user/repo@revision"`,
            `"user/repo:subfolder"` or `"user/repo@revision:subfolder"`.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it is not plain LoRA on linear layers, is published as a pickle, or its files contradict each
            other; the message says which.
    """
    folder, pickled = _fetch(str(source))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{source} holds no adapter: there is no {ADAPTER_CONFIG} in it.")
    try:
        kind = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{source}: {ADAPTER_CONFIG} is not a readable configuration ({error}).") from error
    if kind != "LORA":
        raise ValueError(f"{source} is a {kind} adapter, expected LORA: only LoRA has the update ΔW = γ B A.")
    config = LoraConfig.from_pretrained(str(folder))
    _check_config(config, source)
    if pickled:
        raise ValueError(
            f"{source} has its weights in {_PICKLE}, a pickle, which can run code when it is read. Load it with PEFT "
            "where you trust it, and save it again with `save_pretrained` to get safetensors."
        )
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"{source} has a configuration but no weights: there is no {ADAPTER} in it.")
    try:
        state = safetensors.torch.load_file(folder / ADAPTER)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{source}: {ADAPTER} is damaged ({error}).") from error
    return Adapter(str(source), config, _folded(state, config, source))


def write_adapter(folder: Path, config: LoraConfig, state: AdapterState) -> None:
    """
    Writes a folded adapter that stock PEFT loads, with scaling 1.

    Args:
        folder (`Path`): Where to; it is created if need be.
        config (`peft.LoraConfig`): The configuration it comes from.
        state (`dict[str, torch.Tensor]`): A folded adapter.
    """
    write(folder / ADAPTER, tensor_bytes(state))
    folded_config(config, state).save_pretrained(str(folder))


def check_free(folder: Path) -> None:
    """Raises a `ValueError` if a folder already holds an adapter, which would be overwritten."""
    for name in (ADAPTER_CONFIG, ADAPTER):
        if (folder / name).exists():
            raise ValueError(f"{folder} already holds an adapter ({name}). Choose another folder.")


def check_same_layers(adapters: list[Adapter]) -> None:
    """
    Raises if adapters are not of the same layers of one model.

    Raises:
        ValueError: naming the two adapters and the layers in which they differ, by name or shape.
    """
    first = adapters[0]
    for other in adapters[1:]:
        different = dict(_shapes(first.state).items() ^ _shapes(other.state).items())
        if different:
            raise ValueError(
                f"{first.source} and {other.source} cannot be added: they adapt different layers, or layers of "
                f"different shapes: {', '.join(sorted(different))}. Merge adapters of one base model with the same "
                "target modules."
            )


def _fetch(source: str) -> tuple[Path, bool]:
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
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted)) / prefix
        missing = not (folder / ADAPTER).is_file()
        return folder, missing and file_exists(repo, f"{prefix}{_PICKLE}", revision=revision)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source} is neither a folder nor a repository on the Hub that you can read."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{source} is not a folder, and the Hub could not be asked for it: {error}") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision {revision!r} on the Hub.") from error


def _check_config(config: LoraConfig, source: str | Path) -> None:
    for option, reason in _OTHER_UPDATES.items():
        if getattr(config, option, None):
            raise ValueError(f"{source} is not plain LoRA ({option}): {reason}.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise ValueError(
            f"{source} was trained with init_lora_weights={init!r}, which changes the base weights: its factors are "
            "not an update of the base model. Convert it with PEFT's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=…)` first."
        )


def _folded(state: AdapterState, config: LoraConfig, source: str | Path) -> AdapterState:
    """The state with γ in lora_B. Raises a `ValueError` for what is not a pair of factors of the configured rank."""
    lora_a, lora_b = factors_of(state, "lora_A"), factors_of(state, "lora_B")
    strange = [key for key in state if ".lora_" in key and not re.fullmatch(_FACTOR, key)]
    strange += lora_a.keys() ^ lora_b.keys()
    if strange or not lora_a:
        found = f"has {', '.join(sorted(strange))}" if strange else "has no LoRA factor"
        raise ValueError(f"{source} {found}: expected LoRA on linear layers, lora_A.weight and lora_B.weight of each.")
    folded = dict(state)
    for name, a in lora_a.items():
        b = lora_b[name]
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise ValueError(
                f"{source}: {name} has factors B {tuple(b.shape)} and A {tuple(a.shape)}, expected (d_out, {rank}) "
                f"and ({rank}, d_in): {rank} is its rank by {ADAPTER_CONFIG}."
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{source}: the factors of {name} are not finite (inf or NaN).")
        scaling = alpha / rank**0.5 if config.use_rslora else alpha / rank
        folded[factor_key(name, "lora_A")] = in_full(a)
        folded[factor_key(name, "lora_B")] = in_full(b) * scaling
    return folded


def _shapes(adapter: AdapterState) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each layer."""
    lora_a = factors_of(adapter, "lora_A")
    return {name: (b.shape[0], lora_a[name].shape[1]) for name, b in factors_of(adapter, "lora_B").items()}
