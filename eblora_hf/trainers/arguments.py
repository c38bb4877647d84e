"""
Reads the constructor arguments of the trainer: what is not supported, which adapter is trained, which tasks are
learnt.
"""

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..adapters.heads import find_heads, has_fresh_head, label_layer
from ..adapters.layers import AdaptedLayer, is_quantized
from ..adapters.leftovers import mark_wrapped, take_off_unfinished, trained_adapter, unwrapped
from ..config import EBLoRAConfig
from ..manifold.optimizers import check_optimizer, plain_optimizer
from ..tasks import Task, TaskSequence
from .fsdp import unsupported_launcher

logger = logging.get_logger(__name__)

# what turns raw inputs into a model's, as `processing_class` takes it
Processing = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin

# what PEFT adds to `modules_to_save`
_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def by_name(cls: type, mixin: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Constructor arguments by the names of the class after `mixin` that spells them out.

    Args:
        cls (`type`): A trainer class.
        mixin (`type`): The class among its bases that takes whatever the next one takes.
        args (`tuple`), kwargs (`dict`): What it was called with.

    Raises:
        TypeError: if an argument is given twice, or there are too many.
    """
    for following in cls.__mro__[cls.__mro__.index(mixin) + 1 :]:
        names = inspect.signature(vars(following)["__init__"]).parameters if "__init__" in vars(following) else {}
        if names and not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in names.values()):
            named = dict(zip(list(names)[1:], args, strict=False))
            twice = named.keys() & kwargs.keys()
            if len(args) >= len(names) or twice:
                raise TypeError(f"{cls.__name__} got too many arguments, or twice: {', '.join(twice)}.")
            return named | kwargs
    raise TypeError(f"{cls.__name__} has no trainer class after {mixin.__name__}.")


def check_set_up(arguments: dict[str, Any], config: EBLoRAConfig, constrained: bool, *, continues: bool) -> None:
    """
    Raises a `ValueError` for what the trainer does not support, before anything is built.

    Args:
        arguments (`dict`): The constructor's arguments by name.
        config ([`EBLoRAConfig`]): The options.
        constrained (`bool`): Whether a constraint follows the optimizer.
        continues (`bool`): Whether a sequence is continued.
    """
    if arguments.get("model_init") is not None:
        raise ValueError("`model_init` is not supported: a sequence continues one model. Pass `model=` instead.")
    args = arguments.get("args")
    if args is not None and (args.bf16_full_eval or args.fp16_full_eval):
        raise ValueError(
            "bf16_full_eval and fp16_full_eval are not supported: they cast the model's weights in place, and the "
            "adapter and all later tasks would keep the rounding. Use bf16=True for evaluation under autocast."
        )
    if config.heads == "grow" and args is not None and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor!r} is not supported with heads='grow': while a task "
            "is learnt its own labels alone are answered, and smoothing asks for a share of all. Set it to 0."
        )
    sampling = getattr(args, "train_sampling_strategy", None)
    if config.replay_fraction and sampling == "group_by_length":
        raise ValueError(
            f"EBLoRAConfig(replay_fraction={config.replay_fraction!r}) with train_sampling_strategy={sampling!r} is "
            "not supported: rows of earlier tasks join batches whose lengths were chosen without them. Drop one."
        )
    several = holds_tasks(arguments.get("train_dataset"))
    if getattr(args, "precompute_ref_log_probs", False) and (several or continues):
        raise ValueError(
            "precompute_ref_log_probs=True is not supported with several tasks or `sequence=`: the reference would be "
            "computed before the earlier tasks are on the model, but it is the model after them. Set it to False."
        )
    if constrained:
        _check_optimizers(arguments)
    if args is not None and args.deepspeed:
        raise ValueError(unsupported_launcher("DeepSpeed"))


def _check_optimizers(arguments: dict[str, Any]) -> None:
    """Raises a `ValueError` for an optimizer that no constraint can follow, wherever it was asked for."""
    given, _ = arguments.get("optimizers") or (None, None)
    chosen, _ = arguments.get("optimizer_cls_and_kwargs") or (None, None)
    if given is not None:
        plain_optimizer(given)
    elif chosen is not None:
        is_class = isinstance(chosen, type) and issubclass(chosen, torch.optim.Optimizer)
        if is_class:  # the name of a factory says nothing
            check_optimizer(f"The optimizer {chosen.__name__}", chosen.__name__)
    elif arguments.get("args") is not None:
        optim = arguments["args"].optim
        name = str(getattr(optim, "value", optim))
        check_optimizer(f"optim={name!r}", name)


def with_adapter(model: Any, peft_config: LoraConfig | None, *, own_heads: bool = False) -> PeftModel:
    """
    The model with the LoRA adapter to train, and with its heads among the `modules_to_save`.

    Args:
        model: What the trainer was given.
        peft_config (`LoraConfig`, *optional*): The adapter for a model that has none.
        own_heads (`bool`, defaults to `False`): Whether tasks have heads of their own size.

    Raises:
        ValueError: if there is no adapter, or no single one, or a head was drawn at random and would not be published.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "The model is compiled, and its LoRA layers change between tasks. Pass it as it was before "
            "`torch.compile`, and TrainingArguments(torch_compile=True)."
        )
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"ContinualEBLoRATrainer needs a `model`, got {model!r}. Load it first, with `from_pretrained` for "
            "instance."
        )
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise ValueError(f"`peft_config` must be a peft.LoraConfig, got {peft_config!r}.")
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "The model already is a PeftModel, so `peft_config` would be ignored. Remove it, or pass the base "
                "model (`model.unload()`)."
            )
        adapter = trained_adapter(model)
        if adapter is None:
            raise ValueError(
                f"Expected one active adapter, got {model.active_adapters}: call `model.set_adapter(name)`."
            )
        take_off_unfinished(model, adapter)
        base_model = model.get_base_model()
        named = sorted({*(getattr(model.peft_config[adapter], "modules_to_save", None) or ())})
        unnamed = [head for head in find_heads(base_model) if head not in named]
        if unnamed and (own_heads or has_fresh_head(base_model)):
            raise ValueError(
                f"The {type(base_model).__name__} has the head {', '.join(unnamed)}, which its checkpoint does not "
                "hold: it was drawn at random, and nobody who loads the adapter would have it. Pass "
                f"LoraConfig(modules_to_save={[*named, *unnamed]}) to `get_peft_model`."
            )
        return model
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model carries an adapter from `model.add_adapter`, which transformers manages by itself. Pass the "
            "model without it and a `peft_config`, or a PeftModel from `peft.get_peft_model`."
        )
    if peft_config is None:
        raise ValueError(
            "The model has no LoRA adapter. Add one line to the trainer's arguments:\n"
            "    peft_config=LoraConfig(r=16, target_modules='all-linear'),"
        )
    model = unwrapped(model)
    peft_config = _with_heads(model, peft_config, own_heads)
    heads = {*(peft_config.modules_to_save or ()), *_HEADS.get(peft_config.task_type, ())}
    for name, module in model.named_modules():
        saved = name.rpartition(".")[2] in heads
        if saved and any(is_quantized(part) for part in module.modules()):
            raise ValueError(
                f"{name} is to be trained whole (by the `modules_to_save` or the `task_type` of the LoraConfig), but "
                "its weights are quantized. Load the model with "
                f"BitsAndBytesConfig(llm_int8_skip_modules=[{name!r}]), which also works for 4 bits."
            )
    wrapped = get_peft_model(model, peft_config)
    mark_wrapped(model)
    return wrapped


def _with_heads(model: nn.Module, config: LoraConfig, own_heads: bool) -> LoraConfig:
    """
    The configuration with the heads that nobody has named: those drawn at random, which no stranger could have
    otherwise; and those that `"all-linear"` would take for a layer like others.
    """
    named = {*(config.modules_to_save or ()), *_HEADS.get(config.task_type, ())}
    unnamed = [head for head in find_heads(model) if head not in named]
    if not (own_heads or has_fresh_head(model)):
        if config.target_modules != "all-linear":
            return config
        excluded = [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules
        left_out = {name.partition(".")[0] for name in excluded or ()}
        unnamed = [head for head in unnamed if head not in left_out]
        answering = [head for head in unnamed if label_layer(model, [head])]
        ends = tuple({*named, *answering})  # PEFT takes what ends in a head's name for a head, too: pre_classifier
        unnamed = [head for head in unnamed if head.endswith(ends)]
    if not unnamed:
        return config
    logger.info(f"The head {', '.join(unnamed)} is trained whole, and published with every task.")
    with_heads = copy.deepcopy(config)
    with_heads.modules_to_save = [*(config.modules_to_save or ()), *unnamed]
    return with_heads


def check_layers(layers: list[AdaptedLayer], adapter: str, orthonormal: bool) -> None:
    """
    Raises a `ValueError` if the adapter is frozen, trained already, or of a rank that has no orthonormal factors.
    """
    for layer in layers:
        if orthonormal and layer.rank > min(layer.d_in, layer.d_out):
            raise ValueError(
                f"{layer.name}: rank {layer.rank} exceeds the smaller side of its weight ({layer.d_out} x "
                f"{layer.d_in}), so its factors cannot be orthonormal. Leave the layer out with "
                "LoraConfig(exclude_modules=[…]), set the config's `task_type` if it is the head, or lower `r`."
            )
        if not layer.lora_A.requires_grad:
            raise ValueError(
                f"The adapter {adapter!r} is frozen ({layer.name}). Load it with `is_trainable=True`, or pass the "
                "base model and a `peft_config`."
            )
        if layer.lora_B.any():
            raise ValueError(
                f"The adapter {adapter!r} already holds a trained update ({layer.name}), which a new task would "
                "overwrite: every task starts from a fresh adapter. Keep what it learnt with `model = "
                "model.merge_and_unload()` and pass a `peft_config`, or continue a published sequence with "
                "`sequence=…`."
            )


def check_frozen(model: PeftModel) -> None:
    """
    Raises if something is trained that would not be published: anything but LoRA and the `modules_to_save`.

    Raises:
        ValueError: naming it.
    """
    stray = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and ".modules_to_save." not in name
    ]
    if stray:
        raise ValueError(
            f"{len(stray)} parameters of the base model are trainable, {stray[0]} for one. They would be trained and "
            "not published, and no task is protected from them. Freeze them (`requires_grad_(False)`), or name their "
            "module in LoraConfig(modules_to_save=[…])."
        )


def holds_tasks(train: Any) -> bool:
    """Whether what was given as `train_dataset` are tasks with names, and not one data set."""
    if isinstance(train, (list, tuple)):
        return bool(train) and all(isinstance(task, Task) for task in train)
    return isinstance(train, (Mapping, TaskSequence))


def read_tasks(arguments: dict[str, Any], task_name: str | None) -> TaskSequence | None:
    """Reads the tasks out of the trainer's data arguments, and leaves there what the parent's constructor expects."""
    train, evaluation = arguments.get("train_dataset"), arguments.get("eval_dataset")
    if train is None:
        return None
    if isinstance(train, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ValueError(
            f"train_dataset is a DatasetDict with the splits {', '.join(train)}; a sequence is a plain dict of "
            "training sets by task name. Pass `train_dataset=data['train']`, or `dict(data)` if these are tasks "
            "indeed."
        )
    if isinstance(train, (list, tuple)) and holds_tasks(train):
        train = TaskSequence(list(train))
    if isinstance(train, (list, tuple)) and train and hasattr(train[0], "__len__") and not _is_row(train[0]):
        raise ValueError(
            f"train_dataset is a {type(train).__name__} of {len(train)} {type(train[0]).__name__} objects. Give tasks "
            "names: {'first': data, 'second': more}, or a list of Task(name, data)."
        )
    several = isinstance(train, (Mapping, TaskSequence))
    if several and len(train) > 1 and (arguments.get("optimizers") or (None, None))[0] is not None:
        raise ValueError(
            "An optimizer object serves one task, but train_dataset holds several and each needs a fresh one. Pass "
            "`optimizer_cls_and_kwargs=(cls, kwargs)` or `TrainingArguments(optim=…)` instead of `optimizers`."
        )
    if several and task_name is not None:
        raise ValueError(f"task_name={task_name!r} names a single data set, but train_dataset holds tasks with names.")
    if not several:
        tasks = TaskSequence([Task(task_name or "task", train)])
        if not isinstance(evaluation, Mapping):
            tasks.tasks[0].eval_dataset = evaluation
        elif tasks.names[0] in evaluation:
            tasks.tasks[0].eval_dataset = evaluation[tasks.names[0]]
    else:
        tasks = train if isinstance(train, TaskSequence) else TaskSequence(train)
        own = {task.name: task.eval_dataset for task in tasks if task.eval_dataset is not None}
        if own and evaluation is not None and not isinstance(evaluation, Mapping):
            raise ValueError("eval_dataset must be a dict by task name when tasks bring evaluation sets of their own.")
        if isinstance(evaluation, Mapping) or own:
            evaluation = {**(evaluation or {}), **own}
            missing = [name for name in tasks.names if name not in evaluation]
            if missing:
                raise ValueError(
                    f"eval_dataset has no set for the task(s) {', '.join(missing)}; it has {', '.join(evaluation)}. "
                    "Its keys are the names of the tasks (more are welcome)."
                )
            tasks = TaskSequence([dataclasses.replace(task, eval_dataset=evaluation[task.name]) for task in tasks])
    given = (arguments.get("optimizers") or (None, None))[0] is not None
    for task in tasks:
        if given and task.learning_rate is not None:
            raise ValueError(
                f"The task {task.name!r} sets a learning rate, but `optimizers` brings its own. Drop one."
            )
        if not hasattr(task.train_dataset, "__len__") or not hasattr(task.train_dataset, "__getitem__"):
            raise ValueError(
                f"The training set of {task.name!r} ({type(task.train_dataset).__name__}) has no length: the gradient "
                "snapshot needs a map-style data set. Materialise the stream, or a part of it, as a datasets.Dataset."
            )
        if len(task.train_dataset) == 0:
            raise ValueError(f"The training set of {task.name!r} is empty.")
    arguments["train_dataset"] = tasks.tasks[0].train_dataset
    if evaluation is not None:
        arguments["eval_dataset"] = evaluation
    return tasks


def _is_row(item: Any) -> bool:
    """Whether an item of a list is a row of one data set, and no data set itself."""
    return isinstance(item, (Mapping, str, tuple, list, torch.Tensor))
