"""Options of a continual run."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    Rate = float | str  # a number or "auto"
else:
    Rate = str  # what HfArgumentParser reads from a command line, where numbers are text


@dataclasses.dataclass
class EBLoRAConfig:
    """
    Options of continual fine-tuning, beside the stock `TrainingArguments`. Usable with `HfArgumentParser`.

    Args:
        method (`str`, defaults to `"eblora"`): `"eblora"`, `"ebo"` (no gradient subspace), `"lora"` (sequential
            LoRA), `"olora"`, `"ella"`, `"keeplora"`, `"inflora"` or `"osf"`; see `eblora_hf.methods`.
        direction_lr (`float` or `"auto"`, defaults to `"auto"`): Step of U and V per optimizer step, without
            dimension: under an optimizer whose updates are normalised (the Adam family, Lion, Muon…) the increment is
            `direction_lr`/√d times the update in units of its usual entry, so `learning_rate` has no influence on it
            while its schedule has. `"auto"` is 25 / steps of the task, at most 0.5.
        scale_lr (`float` or `"auto"`, defaults to `"auto"`): Learning rate of s, on the main schedule. `"auto"` is
            1.2 / steps of the task, at most 0.05; with a penalty half as much again, with an `anchor` three times as
            much.
        scale_weight_decay (`float`, defaults to 0.0): Decoupled weight decay of s.
        basis_from (`str`, *optional*): What a basis is grown from after a task: its mean gradient (`"gradients"`, as
            published for EBLoRA), the gradients of its single tokens, which do not cancel out
            (`"token-gradients"`), or the inputs of the layers (`"features"`). A snapshot takes a float32 matrix a
            layer, of the weight's shape for the first and d_in x d_in for the others; see `snapshot_sketch`. By
            default token gradients for EBLoRA and gradients for KeepLoRA.
        energy_threshold (`float`, *optional*): Share ε of that energy that the basis must hold. By default 0.99 of
            mean gradients, and 0.97 of the others.
        weight_energy (`float`, defaults to 0.6): Share of the energy ‖W‖² of each weight whose directions are
            protected from the start by KeepLoRA (0 for none), and before every task by OSF.
        orthogonality_weight (`float`, defaults to 0.5): λ of O-LoRA's penalty.
        overlap_weight (`float`, defaults to 1e3): λ of ELLA's penalty.
        stored_energy (`float`, defaults to 0.999): Share of the energy ‖ΔW‖² of OSF's full-rank updates that their
            adapters hold.
        max_basis_fraction (`float`, defaults to 1.0): Cap on the columns of a basis, as a share of d_in. Whatever it
            is, `r` directions are left free for the next task.
        basis_dtype (`str`, defaults to `"bfloat16"`): How the bases are stored, `"float32"` or `"bfloat16"`: half the
            size for some 1e-5 of the energy. They are made orthonormal again when they are read.
        basis_budget (`float`, *optional*, defaults to 4.0): How large the columns that a task adds to the bases may
            be on disk, with its curvature, over its adapter in float32. Of all layers those with most of their layer's
            energy are kept; what that leaves is in `training.json` and in the card. Not for the task with which
            KeepLoRA adds the directions of the weights. `None` sets no limit.
        snapshot_samples (`int`, defaults to 64): How many samples of a task the snapshot before its training uses at
            most: a 32nd of those that the training will see, but 8 in any case. Where a basis needs a snapshot, it
            uses four times `snapshot_samples`.
        observe_steps (`float`, defaults to 0.2): Share of the training steps at whose end the token gradients of a
            basis are observed, in the passes that train, instead of in a snapshot afterwards; or as many steps as
            `snapshot_samples` samples take, at most half. A snapshot is taken where too little was observed: after an
            early stop, if the best weights are those of an earlier step, and with replay from the second task on,
            whose passes are of other rows as well. 0 always takes one.
        snapshot_fraction (`float`, *optional*): Share of a task's data for both snapshots, in place of
            `snapshot_samples` and `observe_steps`; as published.
        snapshot_sampling (`str`, defaults to `"random"`): `"random"` with the seed of the arguments, or `"even"`
            spacing as in the released code.
        snapshot_at (`str`, defaults to `"current"`): Weights at which snapshots are taken: `"current"`, or
            `"pretrained"` as in the released code.
        snapshot_offload (`bool`, defaults to `False`): Sum snapshots in the memory of the CPU instead of the device.
        snapshot_sketch (`int`, *optional*): Keep sketches of so many columns of a snapshot's matrices instead of the
            matrices. A basis then takes some more columns; one that may hold less than `energy_threshold` is refused.
            By default the sums are whole where they are small, and else sketches that take a quarter of the adapted
            weights in 16 bits at most, of which a basis takes what they hold.
        earlier_tasks_error (`float`, defaults to 0.0): Relative error that the updates of earlier tasks may have in a
            layer while a further one is learnt beside weights of low precision, where they are a frozen adapter that
            grows otherwise. What is published of them stays exact. Weights of float32 have them merged instead.
        heads (`str`, defaults to `"shared"`): The `modules_to_save` that hold a model's labels. `"shared"`: one head,
            trained on from task to task. `"per-task"`: every task gets a fresh one for its own labels. `"grow"`: one
            over the labels of all tasks so far; rows of earlier labels stay as they were learnt.
        head_learning_rate (`float`, *optional*): Learning rate of all `modules_to_save`, heads and projectors, instead
            of that of the arguments, which then is for LoRA alone; on the same schedule.
        replay_fraction (`float`, defaults to 0.0): Share of each task's rows that is kept in `output_dir`, and never
            pushed, to be mixed into the batches of later tasks. Not with heads of the tasks' own.
        replay_batch (`int`, defaults to 8): How many of those rows are added to every batch.
        penalty_weight (`float`, defaults to 10.0): β of the penalty β/2 tr(ΔWᵀ O ΔW C) for changing what earlier tasks
            react to, with O ⊗ C the curvature (K-FAC) of their losses in a weight, of which 2 r directions a task are
            kept on either side, beside the basis. It takes bases of token gradients. 0 for none, as published.
        anchor_weight (`float`, defaults to 1.0): Weight w of the loss of an `anchor`: w T² KL(before ‖ now) for the
            model before the task, and as much for the pre-trained one unless the anchor is `"random"`. Where the head
            is drawn at random or each task has its own, what is held are the last hidden states of the pre-trained
            part, by their squared error over their variance. It is no part of the logged loss, but logged as
            `anchor_loss`.
        anchor_temperature (`float`, defaults to 2.0): Temperature T of both answers.
        anchor_samples (`int`, defaults to 8): Rows of the anchor in each step of the optimizer on each process.
        init_scale_alpha (`float`, defaults to 0.002): |s| of the first transformer block at the start of a task.
        init_scale_beta (`float`, defaults to 0.008): How much larger |s| is at the last block.
        num_layers (`int`, *optional*): Number of blocks in that rule, by default the model's own (the released code:
            32).
        tangent (`str`, defaults to `"orthogonal"`): Map of an increment to the tangent space, the `"orthogonal"`
            projection, or `"canonical"` as released.
        step_scaling (`str`, defaults to `"dimensionless"`): `"dimensionless"` as above, or the increment of the
            optimizer times √(`step_constant`/r) (`"rank"`, the released code), √(`step_constant`/d) (`"rows"`) or 1
            (`"none"`).
        step_constant (`float`, defaults to 4096.0): Constant of the released scalings.
    """

    method: Literal["eblora", "ebo", "lora", "olora", "ella", "keeplora", "inflora", "osf"] = dataclasses.field(
        default="eblora", metadata={"help": "Continual-learning method."}
    )
    direction_lr: Rate = dataclasses.field(
        default="auto", metadata={"help": "Dimensionless step of U and V, or 'auto' (25 / steps)."}
    )
    scale_lr: Rate = dataclasses.field(
        default="auto", metadata={"help": "Learning rate of the scales s, or 'auto' (1.2 to 3.6 / steps)."}
    )
    scale_weight_decay: float = dataclasses.field(default=0.0, metadata={"help": "Decoupled weight decay of s."})
    basis_from: Literal["gradients", "token-gradients", "features"] | None = dataclasses.field(
        default=None, metadata={"help": "What a basis is grown from; by default as suits the method."}
    )
    energy_threshold: float | None = dataclasses.field(
        default=None, metadata={"help": "Share of that energy a basis must hold; by default 0.99 or 0.97."}
    )
    weight_energy: float = dataclasses.field(
        default=0.6, metadata={"help": "Share of each weight's energy that is protected (keeplora, osf)."}
    )
    orthogonality_weight: float = dataclasses.field(default=0.5, metadata={"help": "λ of the penalty (olora)."})
    overlap_weight: float = dataclasses.field(default=1e3, metadata={"help": "λ of the penalty (ella)."})
    stored_energy: float = dataclasses.field(
        default=0.999, metadata={"help": "Share of an update's energy that its adapter holds (osf)."}
    )
    max_basis_fraction: float = dataclasses.field(
        default=1.0, metadata={"help": "Cap on the columns of a basis, as a share of d_in."}
    )
    basis_dtype: Literal["float32", "bfloat16"] = dataclasses.field(
        default="bfloat16", metadata={"help": "How the bases are stored."}
    )
    basis_budget: float | None = dataclasses.field(
        default=4.0, metadata={"help": "Most that a task adds to the bases on disk, over the size of its adapter."}
    )
    snapshot_samples: int = dataclasses.field(
        default=64, metadata={"help": "Most samples of the snapshot before a task."}
    )
    observe_steps: float = dataclasses.field(
        default=0.2, metadata={"help": "Share of the steps, the last ones, in which a basis is observed."}
    )
    snapshot_fraction: float | None = dataclasses.field(
        default=None, metadata={"help": "Share of a task's data used by its snapshots, instead of both."}
    )
    snapshot_sampling: Literal["random", "even"] = dataclasses.field(
        default="random", metadata={"help": "How the samples of a snapshot are chosen."}
    )
    snapshot_at: Literal["current", "pretrained"] = dataclasses.field(
        default="current", metadata={"help": "Weights at which snapshots are taken."}
    )
    snapshot_offload: bool = dataclasses.field(
        default=False, metadata={"help": "Sum snapshots in the memory of the CPU."}
    )
    snapshot_sketch: int | None = dataclasses.field(
        default=None, metadata={"help": "Keep sketches of so many columns of a snapshot's matrices."}
    )
    earlier_tasks_error: float = dataclasses.field(
        default=0.0, metadata={"help": "Error allowed to earlier tasks beside low-precision weights."}
    )
    heads: Literal["shared", "per-task", "grow"] = dataclasses.field(
        default="shared", metadata={"help": "One head for all tasks, one for each, or one that grows with the labels."}
    )
    head_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "Learning rate of modules_to_save; by default that of the arguments."}
    )
    replay_fraction: float = dataclasses.field(
        default=0.0, metadata={"help": "Share of a task's rows that is kept for batches of later tasks."}
    )
    replay_batch: int = dataclasses.field(default=8, metadata={"help": "How many of them are added to a batch."})
    penalty_weight: float = dataclasses.field(
        default=10.0, metadata={"help": "Weight of the penalty for changing what earlier tasks react to."}
    )
    anchor_weight: float = dataclasses.field(default=1.0, metadata={"help": "Weight of the loss of an anchor."})
    anchor_temperature: float = dataclasses.field(
        default=2.0, metadata={"help": "Temperature at which answers to an anchor are compared."}
    )
    anchor_samples: int = dataclasses.field(default=8, metadata={"help": "Rows of the anchor in each training step."})
    init_scale_alpha: float = dataclasses.field(
        default=0.002, metadata={"help": "|s| of the first block at the start of a task."}
    )
    init_scale_beta: float = dataclasses.field(
        default=0.008, metadata={"help": "How much larger |s| is at the last block."}
    )
    num_layers: int | None = dataclasses.field(
        default=None, metadata={"help": "Number of blocks in the rule for |s|; by default the model's own."}
    )
    tangent: Literal["orthogonal", "canonical"] = dataclasses.field(
        default="orthogonal", metadata={"help": "Map of an increment to the tangent space."}
    )
    step_scaling: Literal["dimensionless", "rank", "rows", "none"] = dataclasses.field(
        default="dimensionless", metadata={"help": "How an optimizer's increment becomes a step of U and V."}
    )
    step_constant: float = dataclasses.field(
        default=4096.0, metadata={"help": "Constant c of the scalings 'rank' and 'rows'."}
    )

    def __post_init__(self):
        for name in ("direction_lr", "scale_lr"):
            setattr(self, name, check_rate(name, getattr(self, name)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # not by `field.type`, which HfArgumentParser changes
            if value is None and type(None) in get_args(EBLoRAConfig.__annotations__.get(field.name)):
                continue
            kind = get_args(field.type)[0] if type(None) in get_args(field.type) else field.type
            if kind is float:  # YAML reads 1e-3 as text
                setattr(self, field.name, _number(field.name, value))
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"EBLoRAConfig({field.name}={value!r}): expected one of {', '.join(get_args(kind))}.")
        for name in ("energy_threshold", "max_basis_fraction", "snapshot_fraction", "stored_energy"):
            if getattr(self, name) is not None and not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"EBLoRAConfig({name}={getattr(self, name)!r}): expected a share in (0, 1].")
        for name in ("weight_energy", "earlier_tasks_error", "replay_fraction", "observe_steps"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"EBLoRAConfig({name}={getattr(self, name)!r}): expected a share in [0, 1).")
        for name in (
            "orthogonality_weight",
            "overlap_weight",
            "scale_weight_decay",
            "init_scale_alpha",
            "init_scale_beta",
            "step_constant",
            "anchor_weight",
            "penalty_weight",
        ):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"EBLoRAConfig({name}={getattr(self, name)!r}): expected a number of at least 0.")
        if self.basis_budget is not None and not 0.0 < self.basis_budget < math.inf:
            raise ValueError(f"EBLoRAConfig(basis_budget={self.basis_budget!r}): expected a positive number, or None.")
        for name in ("anchor_temperature", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"EBLoRAConfig({name}={value!r}): expected a positive number.")
        if self.method in ("olora", "ella") and self.earlier_tasks_error:
            raise ValueError(
                f"EBLoRAConfig(method={self.method!r}, earlier_tasks_error={self.earlier_tasks_error!r}): its penalty "
                "is on the earlier adapters as they are."
            )
        if self.method == "inflora" and self.basis_from not in (None, "features"):
            raise ValueError(f"EBLoRAConfig(basis_from={self.basis_from!r}): InfLoRA's basis is one of features.")
        if self.replay_fraction and self.heads != "shared":
            raise ValueError(
                f"EBLoRAConfig(replay_fraction={self.replay_fraction!r}, heads={self.heads!r}): rows of earlier tasks "
                "have labels that the head in training does not answer. Set replay_fraction=0."
            )
        for name in ("num_layers", "snapshot_samples", "snapshot_sketch", "replay_batch", "anchor_samples"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"EBLoRAConfig({name}={value!r}): expected a positive whole number.")

    @classmethod
    def preset(cls, name: str) -> "EBLoRAConfig":
        """
        The released settings of a benchmark, as far as they are ours; s is the true singular value, hence already
        multiplied by the released γ = lora_alpha / r.

        Args:
            name (`str`): `"published"` is the method of the paper, at the learning rates of this package: bases of
                mean gradients and no penalty. `"ucit"` goes with `LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)`
                and `learning_rate=2e-4, weight_decay=0.1` (2e-5 for the sixth task); `"mllm-dcl"` with
                `LoraConfig(r=32, lora_alpha=160, lora_dropout=0.05)` and `learning_rate=2e-5`. Both of these use a
                cosine schedule with `warmup_steps=0.03`, a share of them.

        Raises:
            ValueError: for any other name.
        """
        if name == "published":
            return cls(basis_from="gradients", tangent="canonical", snapshot_fraction=1.0, penalty_weight=0.0)
        released: dict[str, Any] = {
            "basis_from": "gradients",
            "penalty_weight": 0.0,
            "tangent": "canonical",
            "step_scaling": "rank",
            "snapshot_at": "pretrained",
            "snapshot_sampling": "even",
            "snapshot_fraction": 0.2,
            "basis_dtype": "float32",
            "basis_budget": None,
            "num_layers": 32,
        }
        if name == "ucit":
            # γ = 2: s and its learning rate double, and the decay per step (their product) stays
            return cls(**released, scale_lr=4e-4, scale_weight_decay=0.05, init_scale_alpha=0.0, init_scale_beta=0.0)
        if name == "mllm-dcl":
            return cls(**released, scale_lr=1e-4, init_scale_alpha=0.01, init_scale_beta=0.03)  # γ = 5
        raise ValueError(f"EBLoRAConfig.preset({name!r}): expected 'published', 'ucit' or 'mllm-dcl'.")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"EBLoRAConfig({name}={value!r}): expected a number.") from error


def check_rate(name: str, value: Any) -> float | str:
    """A learning rate that may be `"auto"`, or a number given as text on a command line."""
    if value == "auto":
        return value
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0.0 < rate < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive number or 'auto'.")
    return rate
