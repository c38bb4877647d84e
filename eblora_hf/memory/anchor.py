"""What a model answers to some inputs, kept to hold it to that while it is trained.

The distance of answers is that of knowledge distillation (arXiv 1503.02531, section 2), as Learning without Forgetting
(arXiv 1606.09282) uses it against forgetting.
"""

import dataclasses

import torch
from torch.nn import functional

_LIKELIEST = 64  # classes that are kept by themselves; the rest of a vocabulary is one class more
_POSITIONS = 64  # of each sequence that are kept
_SURELY = 1.0 - 1e-6  # the largest probability of the likeliest classes whose complement float32 still knows


@dataclasses.dataclass(frozen=True)
class Distribution:
    """
    The classes that a model has answered with, at the temperature T.

    Args:
        positions (`torch.Tensor`): `(n,)`, where, among the rows of a batch or the flattened positions of its rows.
        probabilities (`torch.Tensor`): `(n, C)`; or `(n, k + 1)`, those of `classes` and of all others together.
        classes (`torch.Tensor`, *optional*): `(n, k)`, the likeliest of many.
        temperature (`float`, defaults to 1.0): T, by which logits are divided.
    """

    positions: torch.Tensor
    probabilities: torch.Tensor
    classes: torch.Tensor | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, logits: torch.Tensor, mask: torch.Tensor | None, temperature: float) -> "Distribution":
        """What logits `(B, C)` or `(B, L, C)` say, on the CPU. See [`positions_of`] for the mask."""
        positions = positions_of(logits, mask)
        chosen = _at(logits, positions) / temperature  # (n, C)
        probabilities, classes = chosen.softmax(dim=-1), None
        if chosen.shape[-1] > _LIKELIEST + 1:
            probabilities, classes = probabilities.topk(_LIKELIEST, dim=-1)  # (n, k)
            rest = (1.0 - probabilities.sum(dim=-1, keepdim=True)).clamp(min=0.0)
            probabilities, classes = torch.cat([probabilities, rest], dim=-1), classes.cpu()
        return cls(positions.cpu(), probabilities.cpu(), classes, temperature)

    def distance(self, logits: torch.Tensor) -> torch.Tensor:
        """T² KL(p ‖ q), from these answers p to those q of other logits, as the mean over the positions."""
        chosen = _at(logits, self.positions.to(logits.device)) / self.temperature
        q = functional.log_softmax(chosen, dim=-1)
        if self.classes is not None:
            q = q.gather(-1, self.classes.to(q.device))  # (n, k)
            rest = torch.log1p(-q.exp().sum(dim=-1, keepdim=True).clamp(max=_SURELY))
            q = torch.cat([q, rest], dim=-1)
        p = self.probabilities.to(q.device)
        divergence = (torch.xlogy(p, p) - p * q).sum(dim=-1)  # (n,)
        return self.temperature**2 * divergence.mean()


@dataclasses.dataclass(frozen=True)
class Features:
    """
    What the pre-trained part of a model has given to heads that answer by labels of their own.

    Args:
        positions (`torch.Tensor`): `(n,)`, as in [`Distribution`].
        values (`torch.Tensor`): `(n, d)`.
        variance (`float`, defaults to 1.0): Mean squared distance from the mean, see [`share_variance`].
    """

    positions: torch.Tensor
    values: torch.Tensor
    variance: float = 1.0

    @classmethod
    def of(cls, features: torch.Tensor, mask: torch.Tensor | None) -> "Features":
        """Features `(B, d)` or `(B, L, d)`, on the CPU. See [`positions_of`] for the mask."""
        positions = positions_of(features, mask)
        return cls(positions.cpu(), _at(features, positions).cpu())

    def distance(self, features: torch.Tensor) -> torch.Tensor:
        """The mean of ‖h - h₀‖² over the positions, by the variance."""
        before = self.values.to(features.device)
        moved = _at(features, self.positions.to(features.device)) - before
        return moved.square().sum(dim=-1).mean() / self.variance


def share_variance(parts: list[Features]) -> list[Features]:
    """
    The same features with the variance of all of them, so that their distance is 1 where no more is left of them than
    their mean, however they are dealt out.
    """
    count = sum(len(part.values) for part in parts)
    mean = torch.stack([part.values.double().sum(dim=0) for part in parts]).sum(dim=0) / count  # (d,)
    variance = sum((part.values - mean).square().sum().item() for part in parts) / count
    if count == 1 or variance == 0.0:
        variance = sum(part.values.double().square().sum().item() for part in parts) / count
    variance = max(variance, torch.finfo(torch.float32).tiny)
    return [dataclasses.replace(part, variance=variance) for part in parts]


Answers = Distribution | Features


def positions_of(outputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    Which outputs of a batch are kept: all of `(B, C)`; of `(B, L, C)` in every row 64 at most, evenly spaced.

    Args:
        outputs (`torch.Tensor`): `(B, C)` or `(B, L, C)`.
        mask (`torch.Tensor`, *optional*): `(B, L)`, not zero where a row has positions of its own and no padding.
            One of another shape says nothing about these outputs.

    Returns:
        `torch.Tensor`: `(n,)`, numbers of rows, or of the flattened positions.

    Raises:
        ValueError: for outputs of any other shape.
    """
    if outputs.ndim not in (2, 3):
        raise ValueError(
            f"An anchor holds outputs of the shape (rows, classes) or (rows, positions, classes), but the model gives "
            f"{tuple(outputs.shape)}. Leave out `anchor`."
        )
    rows = len(outputs)
    if outputs.ndim == 2:
        return torch.arange(rows, device=outputs.device)
    length = outputs.shape[1]
    if mask is None or mask.shape != outputs.shape[:2]:
        mask = torch.ones(outputs.shape[:2])
    chosen = []
    for row, own in enumerate(mask.to(outputs.device)):
        found = own.nonzero().flatten()
        if len(found) > _POSITIONS:
            evenly = torch.linspace(0, len(found) - 1, _POSITIONS, device=found.device)
            found = found[evenly.round().long()]
        chosen.append(row * length + found)
    return torch.cat(chosen)


def _at(outputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Outputs `(n, C)` at flattened positions, in float32 or wider."""
    chosen = outputs.reshape(-1, outputs.shape[-1])[positions]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))
