"""Which torch optimizers a constraint can serve, and how their steps are to be read."""

from collections.abc import Iterable

import torch

# Their updates are normalised element by element: divided by the learning rate, they have entries of order one
_NORMALISED = ("adam", "lion", "rmsprop", "adagrad", "adafactor", "ademamix")

_REFUSED = {
    "schedulefree": "the weights it evaluates are an average of its iterates, which leaves the manifold",
    "lomo": "it updates the weights inside the backward pass, before a constraint can act",
    "galore": "it projects gradients of its own choice, and layer-wise variants step inside the backward pass",
    "apollo": "it projects gradients of its own choice, and layer-wise variants step inside the backward pass",
    "layerwisedummy": "layer-wise optimizers step inside the backward pass, before a constraint can act",
    "lamb": "it scales its steps by the size of the parameters, which is fixed on the manifold",
    "lars": "it scales its steps by the size of the parameters, which is fixed on the manifold",
    "prodigy": "it estimates the length of its steps from how far parameters have moved, which a retraction changes",
    "dadapt": "it estimates the length of its steps from how far parameters have moved, which a retraction changes",
    "lorafa": "it leaves lora_A frozen, and steps lora_B along a projection of its own",
    "riemannianpreconditioned": "its preconditioners are inverse Gram matrices of the factors, which are orthonormal",
    "lbfgs": "it needs a closure, which recomputes gradients after they were projected",
}


def plain_optimizer(optimizer) -> torch.optim.Optimizer:
    """
    The torch optimizer under the wrapper of accelerate: only that one has step hooks.

    Raises:
        TypeError: if there is none.
        ValueError: for a kind of optimizer that no constraint can follow; the message names it and the reason.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(f"Expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        optimizer = optimizer.optimizer
    name = type(optimizer).__name__
    check_optimizer(f"The optimizer {name}", name)
    scaled = isinstance(optimizer, getattr(torch.optim, "Adafactor", ())) or any(
        group.get("scale_parameter") for group in optimizer.param_groups
    )
    if scaled:
        raise ValueError(
            f"The optimizer {name} cannot be kept on the manifold: {_REFUSED['lamb']}. Use transformers' Adafactor "
            "with `scale_parameter=False, relative_step=False`, which is TrainingArguments(optim='adafactor')."
        )
    return optimizer


def set_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], learning_rate: float
) -> None:
    """
    Gives some parameters of a fresh optimizer a learning rate of their own, in groups beside those they were in.

    Args:
        optimizer (`torch.optim.Optimizer`): Before its first step, and without a scheduler.
        parameters (iterable of `torch.nn.Parameter`): Those among its own.
        learning_rate (`float`): Their learning rate.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            others = {key: value for key, value in group.items() if key != "initial_lr"}  # a scheduler's, before
            optimizer.add_param_group({**others, "params": moved, "lr": learning_rate})


def check_optimizer(subject: str, name: str) -> None:
    """
    Raises if the optimizer of a name is of a kind that no constraint can follow.

    Args:
        subject (`str`): What to call it in the message.
        name (`str`): Name of its class, or its name in `TrainingArguments(optim=…)`.

    Raises:
        ValueError: naming it and the reason.
    """
    for stem, reason in _REFUSED.items():
        if stem in name.lower().replace("_", ""):
            raise ValueError(
                f"{subject} cannot be kept on the manifold: {reason}. Use for example "
                "TrainingArguments(optim='adamw_torch')."
            )


def entry_size(optimizer: torch.optim.Optimizer, group: dict, rows: int, columns: int) -> float | None:
    """
    The root mean square entry of an optimizer's update of a matrix, divided by the learning rate, if it is known.

    It is about 1 for optimizers that normalise their updates element by element (the Adam family, RMSprop, Lion,
    Adafactor…). Muon makes updates orthonormal, so that the entries are 1/√max(rows, columns), then multiplies them
    by √(rows / columns) where that is more than 1, or so that they are 0.2 (arXiv 2502.16982).

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        group (`dict`): Its group of the parameter.
        rows (`int`), columns (`int`): Shape of the parameter.

    Returns:
        `float`; `None` for an optimizer whose updates are as large as the gradients (SGD), or an unknown one.
    """
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    if any("muon" in name for name in names) and group.get("use_muon", True):
        if group.get("adjust_lr_fn") == "match_rms_adamw":
            return 0.2
        return (max(1.0, rows / columns) / max(rows, columns)) ** 0.5
    return 1.0 if any(stem in name for name in names for stem in (*_NORMALISED, "muon")) else None


class ParameterGroups:
    """
    Looks up the learning rates of an optimizer's groups: the current ones and those the schedule started from.

    Args:
        optimizer (`torch.optim.Optimizer`): Its groups are looked up at every call, since `load_state_dict` replaces
            them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._group_of = {
            id(parameter): index for index, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        }
        # a scheduler made before us has already scaled `lr` and kept the original
        self._base_lr = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]

    def __contains__(self, parameter: torch.nn.Parameter) -> bool:
        return id(parameter) in self._group_of

    def index(self, parameter: torch.nn.Parameter) -> int:
        """The group of a parameter."""
        return self._group_of[id(parameter)]

    def base_lr(self, index: int) -> float:
        """
        The learning rate of a group before any schedule.

        Raises:
            ValueError: if it is not a positive number (Adafactor's relative steps, for instance).
        """
        lr = self._base_lr[index]
        if lr is None or not float(lr) > 0:
            raise ValueError(
                f"The optimizer's learning rate for the LoRA factors is {lr}: a positive one is needed, since the "
                "steps on the manifold follow its schedule. Set `learning_rate`."
            )
        return float(lr)

    def schedule(self, index: int) -> float:
        """The share of a group's learning rate that its schedule gives to the current step."""
        return float(self.optimizer.param_groups[index]["lr"]) / self.base_lr(index)
