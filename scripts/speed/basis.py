"""The basis update of one layer: ours against the released code's two full singular value decompositions."""

from typing import Any

import torch

from eblora_hf.memory.basis import extend_basis

from .timing import interleaved

SHAPES = {
    "tiny": [(48, 32)],
    "vit": [(768, 768)],
    "1b": [(2048, 2048), (2048, 8192), (8192, 2048)],
    "7b": [(4096, 4096)],
}
_THRESHOLD = 0.99


def measure_basis(d_out: int, d_in: int, kind: str, device: torch.device) -> dict[str, Any]:
    """
    For a gradient of low rank (singular values falling by a tenth each) or of high rank (slowly falling, the energy in
    about half of all directions).
    """
    torch.manual_seed(0)
    side = min(d_out, d_in)
    left, right = (torch.linalg.qr(torch.randn(d, side, device=device)).Q for d in (d_out, d_in))
    decay = 0.9 if kind == "low" else 0.05 ** (1.0 / side)
    gradient = (left * decay ** torch.arange(side, device=device)) @ right.mT
    del left, right

    times = interleaved(
        {
            "ours": lambda: extend_basis(gradient, threshold=_THRESHOLD),
            "svd": lambda: torch.linalg.svd(gradient, full_matrices=False),
        },
        device,
        seconds=15.0,
        at_most=3,
    )
    extension = extend_basis(gradient, threshold=_THRESHOLD)
    energies = torch.linalg.svdvals(gradient.double()).square().cumsum(0)
    inside = (gradient.double() @ extension.columns.double()).square().sum() / energies[-1]
    return {
        "what": "basis",
        "shape": f"{d_out}x{d_in}",
        "kind": f"{kind} rank",
        "ours_ms": times["ours"],
        "two_svds_over_ours": 2.0 * times["svd"] / times["ours"],
        "columns": extension.columns.shape[1],
        "fewest_columns": int((energies < _THRESHOLD * energies[-1]).sum()) + 1,
        "asked": _THRESHOLD,
        "captured": inside.item(),
        "reported": extension.captured,
    }
