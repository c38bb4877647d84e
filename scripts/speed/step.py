"""One step of the optimizer on the factors of a layer set: ours, AdamW, geoopt's RiemannianAdam, the released one."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from eblora_hf.adapters.factors import Factors
from eblora_hf.manifold.constraint import StiefelConstraint

from .released import ReleasedAdamW
from .timing import interleaved, orthonormal, shapes_of


def measure_step(name: str, rank: int, columns: int, device: torch.device) -> dict[str, Any] | None:
    """
    Ratios of one step on a layer set with a basis of so many columns in every layer; `None` where they leave no room.

    Gradients are random and fresh in every step, as after a backward pass; putting them there is not timed, freeing
    them (`zero_grad`) is.
    """
    shapes = shapes_of(name, device)
    if any(columns + rank > d_in or rank > d_out for d_out, d_in in shapes):
        return None
    torch.manual_seed(0)
    starts, bases = [], []
    for d_out, d_in in shapes:
        q = orthonormal(d_in, columns + rank, device)
        bases.append(q[:, :columns].contiguous() if columns else None)
        starts.append((orthonormal(d_out, rank, device), q[:, columns:].contiguous()))
    gradients = [1e-2 * torch.randn_like(x) for pair in starts for x in pair]
    contenders = {
        "adamw_fused": _adamw(starts, gradients, fused=True),
        "ours": _ours(starts, bases, gradients),
        "adamw_foreach": _adamw(starts, gradients, foreach=True),
        "released": _released(starts, bases, gradients),
        "products": _products(starts, bases, gradients),
    }
    if not columns:
        contenders |= _geoopt(starts, gradients)
    times = interleaved(
        {key: contender.step_and_free for key, contender in contenders.items()},
        device,
        prepare={key: contender.refill for key, contender in contenders.items()},
    )
    row = {"what": "step", "set": name, "rank": rank, "basis": columns, "layers": len(shapes)}
    row |= {f"{key}_ms": value for key, value in times.items()}
    row |= {f"{key}_over_adamw_fused": value / times["adamw_fused"] for key, value in times.items()}
    del row["adamw_fused_over_adamw_fused"]
    row["released_over_ours"] = times["released"] / times["ours"]
    if contenders["released"].failures:
        row["released_svd_failures"] = contenders["released"].failures
    row["orthonormality"], row["restriction"] = contenders["ours"].constraint.deviation()
    return row


class _Contender:
    """Parameters with their gradients, and a step."""

    def __init__(self, parameters: list[torch.Tensor], gradients: list[torch.Tensor], step: Callable[[], Any]):
        self.parameters, self.gradients, self.step = parameters, gradients, step
        self.constraint: StiefelConstraint | None = None
        self.failures = 0

    def step_and_free(self) -> None:
        self.step()
        for parameter in self.parameters:
            parameter.grad = None

    def refill(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.clone()


def _adamw(starts: list, gradients: list[torch.Tensor], **kind) -> _Contender:
    parameters = [nn.Parameter(x.clone()) for pair in starts for x in pair]
    return _Contender(parameters, gradients, torch.optim.AdamW(parameters, lr=1e-4, **kind).step)


def _as_lora(starts: list, gradients: list[torch.Tensor]) -> tuple[list, list, list[torch.Tensor]]:
    """lora_B and lora_A with the gradients of both, layer by layer, as a model holds them."""
    lora_B = [nn.Parameter(u.clone()) for u, _ in starts]
    lora_A = [nn.Parameter(v.mT.clone(memory_format=torch.contiguous_format)) for _, v in starts]
    return lora_B, lora_A, [g.mT.contiguous() if i % 2 else g for i, g in enumerate(gradients)]


def _ours(starts: list, bases: list, gradients: list[torch.Tensor]) -> _Contender:
    lora_B, lora_A, gradients = _as_lora(starts, gradients)
    layers, factors = [], {}
    for index, (u, v) in enumerate(starts):
        factors[str(index)] = Factors(u, v, -0.01)
        shape = {"rank": u.shape[1], "d_in": v.shape[0], "d_out": u.shape[0], "scaling": 1.0}
        layers.append(SimpleNamespace(name=str(index), lora_A=lora_A[index], lora_B=lora_B[index], **shape))
    parameters = [parameter for pair in zip(lora_B, lora_A, strict=True) for parameter in pair]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    constraint = StiefelConstraint(
        optimizer,
        layers,
        factors,
        {str(i): basis for i, basis in enumerate(bases) if basis is not None},
        direction_lr=0.02,
        scale_lr=1e-3,
        tangent="orthogonal",
    )
    contender = _Contender(parameters, gradients, optimizer.step)
    contender.constraint = constraint
    return contender


def _released(starts: list, bases: list, gradients: list[torch.Tensor]) -> _Contender:
    lora_B, lora_A, gradients = _as_lora(starts, gradients)
    parameters = [parameter for pair in zip(lora_B, lora_A, strict=True) for parameter in pair]
    optimizer = ReleasedAdamW(lora_B, lora_A, bases, lr=2e-5)
    contender = _Contender(parameters, gradients, optimizer.step)

    @torch.no_grad()
    def step() -> None:
        try:
            optimizer.step()
        except torch.linalg.LinAlgError:  # LAPACK's gesdd, on matrices whose singular values are all alike
            contender.failures += 1
            for parameter, start in zip(parameters, (x for pair in starts for x in pair), strict=True):
                parameter.copy_(start if parameter.shape == start.shape else start.mT)

    contender.step = step
    return contender


def _geoopt(starts: list, gradients: list[torch.Tensor]) -> dict[str, _Contender]:
    try:
        import geoopt
    except ImportError:
        return {}
    manifold = geoopt.EuclideanStiefel()
    parameters = [geoopt.ManifoldParameter(x.clone(), manifold=manifold) for pair in starts for x in pair]
    return {"geoopt": _Contender(parameters, gradients, geoopt.optim.RiemannianAdam(parameters, lr=1e-4).step)}


def _products(starts: list, bases: list, gradients: list[torch.Tensor]) -> _Contender:
    """The matrix products that any such step consists of, alone and on memory that is in the cache."""
    groups: dict[torch.Size, int] = {}
    for pair, basis in zip(starts, bases, strict=True):
        for x, restriction in zip(pair, (None, basis), strict=True):
            key = (x.shape, 0 if restriction is None else restriction.shape[1])
            groups[key] = groups.get(key, 0) + 1
    pieces = []
    for ((d, r), p), count in groups.items():
        fitting = max(2**21 // (4 * d * (r + p)), 1)
        at_once = max(n for n in range(1, count + 1) if count % n == 0 and n <= fitting)
        device = starts[0][0].device
        x, y, small = (torch.randn(at_once, *shape, device=device) for shape in ((d, r), (d, r), (r, r)))
        basis = torch.randn(at_once, d, p, device=device) if p else None
        pieces.append((count // at_once, x, y, small, basis))

    def step() -> None:
        for times, x, y, small, basis in pieces:
            for _ in range(times):
                for _ in range(3):
                    torch.bmm(x.mT, y, out=small)
                    torch.bmm(x, small, out=y)
                for _ in range(2 if basis is not None else 0):
                    y.baddbmm_(basis, basis.mT @ y, beta=0.0)
                y.fill_(1e-3)

    return _Contender([], [], step)
