"""PEFT LoRA adapters as files, written for stock PEFT, and whether several can be added."""

from pathlib import Path

from peft import LoraConfig

from ..adapters.states import AdapterState, factors_of, folded_config
from ..published.files import tensor_bytes, write
from ..published.index import ADAPTER, ADAPTER_CONFIG
from ..published.plain_lora import Adapter


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


def _shapes(adapter: AdapterState) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each layer."""
    lora_a = factors_of(adapter, "lora_A")
    return {name: (b.shape[0], lora_a[name].shape[1]) for name, b in factors_of(adapter, "lora_B").items()}
