"""The updates of earlier tasks on a model while a further one is learnt, at a cost that does not grow with them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel

from .composition import EARLIER_TASKS, activate, compress, load_adapter, put_earlier_tasks
from .layers import AdaptedLayer
from .states import AdapterState, factors_of, heads_of
from .switches import pretrained


@dataclass
class EarlierTasks:
    """
    Puts the sum of earlier tasks on a model and takes it off again.

    Merged into the weights they cost nothing per step. Into float32 that is exact up to rounding, and the weights as
    they were are kept in the memory of the CPU, to be put back bit for bit. Weights of low precision, or products of
    low precision, would lose most of a small update, so there the tasks stay beside the weights as one frozen adapter,
    whose rank grows with every task unless some error is allowed.

    Args:
        merge (`bool`): Whether weights of float32 or wider may be merged into.
        error (`float`): Relative error ‖ΔW - ΔW̃‖ / ‖ΔW‖ that a layer of a frozen adapter may have, for a lower rank.
    """

    merge: bool
    error: float

    def __post_init__(self):
        self._weights: dict[str, torch.Tensor] = {}  # as they were, by layer name
        self._layers: list[AdaptedLayer] = []
        self._state: AdapterState = {}

    def put(self, model: PeftModel, layers: list[AdaptedLayer], state: AdapterState) -> dict[str, float | str]:
        """
        Puts earlier tasks on the model, in place of those that were.

        Args:
            model (`PeftModel`): The model, with the adapter of `layers`, which takes over their `modules_to_save`.
            layers (`list[AdaptedLayer]`): The layers of the trainable adapter.
            state (`dict[str, torch.Tensor]`): Concatenation of their folded adapters.

        Returns:
            `dict`: Their `form` (`"merged"` or `"adapter"`), and the adapter's highest `rank` and its `error`.
        """
        self.take_off(model)
        self._layers, self._state = layers, state
        if self.merge and not any(layer.quantized or torch.finfo(layer.weight.dtype).bits < 32 for layer in layers):
            load_adapter(model, layers[0].adapter, heads_of(state))
            self._merge()
            return {"form": "merged"}
        adapter, error = compress(state, self.error) if self.error > 0.0 else (state, 0.0)
        put_earlier_tasks(model, layers[0].adapter, adapter)
        return {"form": "adapter", "rank": max(map(len, factors_of(adapter, "lora_A").values())), "error": error}

    @torch.no_grad()
    def _merge(self) -> None:
        a, b = factors_of(self._state, "lora_A"), factors_of(self._state, "lora_B")
        for layer in self._layers:
            weight = layer.weight
            self._weights[layer.name] = weight.detach().to("cpu", copy=True)
            delta = b[layer.name].to(weight) @ a[layer.name].to(weight)  # (d_out, d_in)
            weight.add_(layer.oriented(delta))

    def leave(self, model: PeftModel) -> None:
        """
        Leaves the weights as they were and the earlier tasks as a frozen adapter, whatever form they had; for a model
        whose training ends half-way.
        """
        if self._weights:
            self.restore()
            without_heads = {key: value for key, value in self._state.items() if key not in heads_of(self._state)}
            put_earlier_tasks(model, self._layers[0].adapter, without_heads)

    def take_off(self, model: PeftModel) -> None:
        """Leaves the model without the earlier tasks."""
        self.restore()
        if EARLIER_TASKS in model.peft_config:
            adapter = next(name for name in model.active_adapters if name != EARLIER_TASKS)
            model.delete_adapter(EARLIER_TASKS)
            activate(model, adapter)

    @contextlib.contextmanager
    def away(self, model: PeftModel) -> Iterator[None]:
        """Within the context the model is the pre-trained one: no adapter acts, and nothing is merged."""
        merged = bool(self._weights)
        self.restore()
        try:
            with pretrained(model):
                yield
        finally:
            if merged:
                self._merge()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back the weights as they were before a merge."""
        for layer in self._layers:
            if layer.name in self._weights:
                layer.weight.copy_(self._weights[layer.name])
                del self._weights[layer.name]  # only then: whatever comes in between, it can be done again
