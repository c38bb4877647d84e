"""What a sequence of tasks will take, by the shapes of a model: nothing is loaded but its config."""

import dataclasses
from dataclasses import dataclass

import torch
import transformers
from peft import LoraConfig, get_peft_model

from ..adapters.layers import find_layers
from ..config import EBLoRAConfig
from ..manifold.penalty import MOST_COLUMNS
from ..memory.accumulators import Storage
from ..memory.basis import column_cap
from ..memory.budget import LayerShape, bytes_of_sums, choose_storage, roots_within_budget, sketched_outputs
from ..methods.build import build_method

WEIGHTS = {"float32": 4.0, "bfloat16": 2.0, "4-bit": 0.5 + 4 / 64}  # bytes; NF4 has a float32 scale for 64 weights
_FLOAT32 = 4
_ADAM = 2  # moments


@dataclass(frozen=True)
class Cost:
    """
    What learning `tasks` tasks takes; bytes, on each GPU where it is memory.

    Args:
        weights (`int`): The model.
        adapter (`int`): The adapter in training with its gradients.
        optimizer (`int`): AdamW's moments of it, and the factors in full precision beside it.
        snapshot (`int`): Sums while a snapshot is taken or steps are observed, at most.
        earlier_tasks (`int`): Earlier tasks as a frozen adapter, while the last task is learnt; none beside float32
            weights, which have them merged by most methods.
        bases (`int`): Bases of the earlier tasks while the last is learnt, at most.
        task_adapter (`int`): A task's adapter on disk.
        task_bases (`int`): What it adds to the bases on disk, at most.
        disk (`int`): The sequence on disk and on the Hub after all tasks, at most.
        root_rank (`int`): Rank of the root adapter after all tasks.
        layers (`int`): Adapted layers.
    """

    weights: int
    adapter: int
    optimizer: int
    snapshot: int
    earlier_tasks: int
    bases: int
    task_adapter: int
    task_bases: int
    disk: int
    root_rank: int
    layers: int

    @property
    def memory(self) -> int:
        """All that is held at once, but for activations."""
        return self.weights + self.adapter + self.optimizer + self.snapshot + self.earlier_tasks + self.bases


def estimate_cost(
    config: transformers.PretrainedConfig,
    lora: LoraConfig,
    options: EBLoRAConfig | None = None,
    *,
    tasks: int = 1,
    dtype: str = "bfloat16",
    gpus: int = 1,
    sharded: bool = False,
) -> Cost:
    """
    What a sequence of tasks takes, from a model's config and the options of its adapters.

    Args:
        config (`PretrainedConfig`): Of the model; its `architectures` name the class.
        lora (`LoraConfig`): Of each task's adapter.
        options ([`EBLoRAConfig`], *optional*): Of the method.
        tasks (`int`, defaults to 1): How many are learnt.
        dtype (`str`, defaults to `"bfloat16"`): Of the model's weights, `"float32"`, `"bfloat16"` or `"4-bit"`.
        gpus (`int`, defaults to 1): How many train.
        sharded (`bool`, defaults to `False`): Whether they share the weights (FSDP2), or each holds all (DDP).

    Returns:
        [`Cost`].

    Raises:
        ValueError: if the config names no class of transformers, or an argument is out of range.
    """
    if dtype not in WEIGHTS:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(WEIGHTS)}.")
    if tasks < 1 or gpus < 1:
        raise ValueError(f"tasks={tasks}, gpus={gpus}: expected positive whole numbers.")
    options = options or EBLoRAConfig()
    if options.method == "osf":
        raise ValueError("method='osf': the ranks of its adapters are those of the weights, which are not loaded.")
    shapes, adapted, others, heads = _shapes(config, lora)
    method, share = build_method(options), gpus if sharded else 1
    factors = _FLOAT32 * sum(shape.adapter for shape in shapes)
    other_bytes = WEIGHTS["bfloat16" if dtype == "4-bit" else dtype]
    added, held = _bases(shapes, options, tasks) if method.remembers else (0, 0)
    if method.remembers == "curvature":
        held += sum(
            min(MOST_COLUMNS, (tasks - 1) * _roots(shape, options)) * (shape.d_in + shape.d_out) for shape in shapes
        )
    in_full = method.constrained and method.orthonormal
    task_adapter = factors + _FLOAT32 * heads
    return Cost(
        weights=int((adapted * WEIGHTS[dtype] + others * other_bytes) / share),
        adapter=int(2 * task_adapter / share),
        optimizer=int(_ADAM * task_adapter / share) + (factors if in_full else 0),
        snapshot=_sums(shapes, options, method.starts_from, method.remembers),
        earlier_tasks=0 if dtype == "float32" and method.merges_earlier_tasks else int((tasks - 1) * factors / share),
        bases=_FLOAT32 * held,
        task_adapter=task_adapter,
        task_bases=added,
        disk=tasks * (2 * factors + _FLOAT32 * heads + added) + _FLOAT32 * heads,
        root_rank=tasks * max(shape.rank for shape in shapes),
        layers=len(shapes),
    )


def as_table(cost: Cost, tasks: int) -> str:
    """The figures in GB, a line each."""
    memory = {
        "weights": cost.weights,
        "adapter in training and its gradients": cost.adapter,
        "optimizer, factors in full precision": cost.optimizer,
        "snapshot or observation, at its peak": cost.snapshot,
        f"{tasks - 1} earlier tasks beside the weights": cost.earlier_tasks,
        f"bases of {tasks - 1} earlier tasks, at most": cost.bases,
        "memory of a GPU, without activations": cost.memory,
    }
    disk = {
        "a task's adapter": cost.task_adapter,
        "a task's bases, at most": cost.task_bases,
        f"the sequence of {tasks} tasks, at most": cost.disk,
    }
    lines = [f"{name:<42}{size / 1e9:>9.3f} GB" for name, size in memory.items()]
    lines += ["on disk, and on the Hub:", *(f"  {name:<40}{size / 1e9:>9.3f} GB" for name, size in disk.items())]
    return "\n".join([*lines, f"rank of the root adapter: {cost.root_rank}, adapted layers: {cost.layers}"])


def _shapes(config: transformers.PretrainedConfig, lora: LoraConfig) -> tuple[list[LayerShape], int, int, int]:
    """The adapted layers, and how many numbers are in their weights, in all others, and in the `modules_to_save`."""
    names = config.architectures or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        raise ValueError(f"The config names no class of transformers in `architectures`, got {names!r}.")
    try:
        with torch.device("meta"):
            model = get_peft_model(architecture(config), dataclasses.replace(lora))
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"The config does not fit the class {names[0]} that its `architectures` name: {error}"
        ) from error
    layers = find_layers(model, "default")
    shapes = [LayerShape(layer.d_out, layer.d_in, layer.rank) for layer in layers]
    adapted = sum(shape.d_in * shape.d_out for shape in shapes)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    heads = sum(count for name, count in counts.items() if ".modules_to_save." in name)
    lora_numbers = sum(count for name, count in counts.items() if ".lora_" in name)
    return shapes, adapted, sum(counts.values()) - lora_numbers - heads - adapted, heads


def _sums(shapes: list[LayerShape], options: EBLoRAConfig, *kinds: str | None) -> int:
    """Bytes of the larger one of the snapshots that a task takes."""
    largest = 0
    for kind in (kind for kind in kinds if kind is not None):
        second_moment = kind != "gradients"
        if options.snapshot_offload or options.snapshot_sketch is not None:
            storage = Storage(options.snapshot_offload, options.snapshot_sketch)
        else:
            storage = choose_storage(shapes, second_moment=second_moment, budget=options.basis_budget)
        size = bytes_of_sums(shapes, storage, second_moment=second_moment)
        if kind == "curvature" and not storage.offload:
            size += _FLOAT32 * sketched_outputs(shape.rank for shape in shapes) * sum(shape.d_out for shape in shapes)
        largest = max(largest, size)
    return largest


def _roots(shape: LayerShape, options: EBLoRAConfig) -> int:
    """Columns of the roots of a layer's curvature on either side."""
    return roots_within_budget(shape.rank, options.basis_budget, getattr(torch, options.basis_dtype).itemsize)


def _bases(shapes: list[LayerShape], options: EBLoRAConfig, tasks: int) -> tuple[int, int]:
    """Bytes that a task adds on disk, and numbers in the bases that the last task is learnt under; at most."""
    itemsize = getattr(torch, options.basis_dtype).itemsize
    room = sum(shape.d_in * column_cap(shape.d_in, shape.rank, 0, options.max_basis_fraction) for shape in shapes)
    roots = 0
    if build_method(options).remembers == "curvature":
        roots = sum(_roots(shape, options) * (shape.d_in + shape.d_out) for shape in shapes)
    added = room
    if options.basis_budget is not None:
        budget = int(options.basis_budget * _FLOAT32 * sum(shape.adapter for shape in shapes) / itemsize)
        added = min(room, max(budget - roots, 0))
    return (added + roots) * itemsize, min(room, (tasks - 1) * added)
