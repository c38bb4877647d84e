"""The factorisation ΔW = s U Vᵀ of every layer's update, and its file beside a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from .layers import AdaptedLayer

STATE_FILE = "eblora_state.safetensors"


@dataclass(frozen=True)
class Factors:
    """
    The factorisation ΔW = s U Vᵀ of one layer's update.

    Args:
        U (`torch.Tensor` of shape `(d_out, r)`): Orthonormal columns.
        V (`torch.Tensor` of shape `(d_in, r)`): Orthonormal columns.
        s (`float`): All singular values of the update, up to the sign.
    """

    U: torch.Tensor
    V: torch.Tensor
    s: float


def factors_from_state(state: dict[str, torch.Tensor], layers: list[AdaptedLayer]) -> dict[str, Factors]:
    """
    The factors in a constraint's saved state, by layer name.

    Raises:
        ValueError: if the state is not of these layers; the message names the first one missing or of another shape.
    """
    check_state(state, layers)
    return {
        layer.name: Factors(state[f"{layer.name}.U"], state[f"{layer.name}.V"], state[f"{layer.name}.s"].item())
        for layer in layers
    }


def check_state(state: dict[str, torch.Tensor], layers: list[AdaptedLayer]) -> None:
    """Raises a `ValueError` if a constraint's saved state is not of these layers."""
    for layer in layers:
        expected = {"U": (layer.d_out, layer.rank), "V": (layer.d_in, layer.rank), "s": (1,)}
        for key, shape in expected.items():
            tensor = state.get(f"{layer.name}.{key}")
            if tensor is None or tuple(tensor.shape) != shape:
                found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"{STATE_FILE} does not belong to this model: expected {key} of {layer.name} with shape {shape}, "
                    f"found {found}. Resume with the model, rank and target modules of the checkpoint."
                )


def save_state(state: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Saves a constraint's state into a checkpoint folder."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    safetensors.torch.save_file(state, Path(folder) / STATE_FILE)


def load_state(folder: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads a constraint's state from a checkpoint folder.

    Raises:
        FileNotFoundError: if the checkpoint has none: it is incomplete or was written without a constraint.
        ValueError: if the file is damaged.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint is incomplete, or was not written by this method. Without it what "
            "constrains the steps cannot be recovered from the adapter. Delete the folder and resume from an earlier "
            "checkpoint."
        )
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise ValueError(
            f"{path} is damaged ({error}). Delete the checkpoint folder and resume from an earlier one."
        ) from error


def decompose_product(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The singular value decomposition of B A from the factors alone, in float64.

    With B = Q_B R_B and Aᵀ = Q_A R_A it is that of the r x r matrix R_B R_Aᵀ = P Σ Qᵀ: U = Q_B P and Vᵀ = Qᵀ Q_Aᵀ.

    Args:
        b (`torch.Tensor` of shape `(d_out, r)`), a (`torch.Tensor` of shape `(r, d_in)`): The factors.

    Returns:
        `tuple` of U `(d_out, k)`, σ `(k,)` in descending order and Vᵀ `(k, d_in)`, with k = min(r, d_out, d_in).

    Example:

    >>> u, sigma, vt = decompose_product(torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0, 3.0]]))
    >>> sigma.tolist()
    [6.0]
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, sigma, vt @ q_a.T
