"""What a `Trainer` needs so that a sequence of tasks can be learnt on a model sharded by FSDP2."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from ..adapters.composition import load_adapter
from ..adapters.factors import load_state
from ..adapters.sharding import whole
from ..published.files import write
from .processes import check_same_everywhere
from .surface import TrainerSurface

_METHODS = ("eblora", "ebo", "lora")  # the others write into adapters, or look at whole weights


class ShardedMixin(TrainerSurface):
    """
    Overrides what a `Trainer` does with a model that accelerate shards by FSDP2, and nothing where it does not.

    The model is sharded before the first snapshot and stays so: sharding cannot be taken off again, so that all tasks
    train the same parameters. Only the adapter is gathered to be saved.
    """

    def check_sharding(self) -> None:
        """
        Raises a `ValueError` if the model would be sharded or flattened in a way that the constraint cannot follow.
        """
        if self.is_deepspeed_enabled:  # asked for by `accelerate launch`
            raise ValueError(unsupported_launcher("DeepSpeed"))
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(unsupported_launcher("a model sharded at load time (`DistributedConfig`)"))
        if not self.is_fsdp_enabled:
            if self.args.fsdp:
                raise ValueError(
                    "fsdp was asked for, but accelerate does not shard on this device (on a CPU it takes "
                    "DistributedDataParallel instead without a word). Remove the argument."
                )
            return
        if self.eblora_config.heads != "shared":
            raise ValueError(
                f"EBLoRAConfig(heads={self.eblora_config.heads!r}) is not supported with FSDP2: it shards the head "
                "that the model came with, and every task has one of another size. Use DDP, or heads='shared'."
            )
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(unsupported_launcher("FSDP version 1"))
        reasons = {
            "cpu_ram_efficient_loading": "the snapshot before the first task needs the weights on every process",
            "activation_checkpointing": "it would be put around the model once more with every task; use "
            "TrainingArguments(gradient_checkpointing=True)",
            "cpu_offload": "factors are gathered on the device",
        }
        offloads = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
        for option, reason in reasons.items():
            if offloads if option == "cpu_offload" else getattr(plugin, option):
                raise ValueError(f"FSDP2 with {option} is not supported: {reason}.")
        if any(type(layer.weight).__name__ == "Int8Params" for layer in self.layers):
            raise ValueError("FSDP2 with an 8-bit base is not supported: weights lose their scales. Use 4 bits.")
        if self.args.torch_compile:
            raise ValueError("torch_compile together with FSDP2 is not supported: drop one of the two.")
        if self.eblora_config.method not in _METHODS:
            raise ValueError(
                f"The method {self.eblora_config.method!r} needs whole weights or writes into adapters, which FSDP2 "
                f"shards. Use DistributedDataParallel, or one of {', '.join(_METHODS)}."
            )

    def shard(self) -> None:
        """Shards the model, if it is to be and is not yet."""
        if not self.is_fsdp_enabled or self._fsdp_modules():
            return
        check_same_everywhere(  # every process would keep a shard of its own model
            {
                name: parameter.detach().flatten()[:: max(parameter.numel() // 4096, 1)]
                for name, parameter in self.model.named_parameters()
                if ".lora_" not in name  # drawn anew for every task
            }
        )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        dtypes = {parameter.dtype for parameter in trained}
        if len(dtypes) > 1 and self.accelerator.mixed_precision == "no":
            raise ValueError(
                f"FSDP2 needs all trained parameters in one dtype, but the adapter and its `modules_to_save` are of "
                f"{' and '.join(sorted(map(str, dtypes)))}. Train with bf16=True, which keeps them in float32."
            )
        stand_in = torch.optim.SGD(trained, lr=1.0)  # accelerate takes a model only together with an optimizer
        try:
            self.model, _ = self.accelerator.prepare(self.model, stand_in)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"accelerate cannot shard a {type(self.model.get_base_model()).__name__} like this: {error} Name its "
                "blocks in fsdp_config['transformer_layer_cls_to_wrap'], or use DistributedDataParallel."
            ) from error
        self.unwrap()

    def unwrap(self) -> None:
        """
        Takes off what accelerate put around the model. Left on, wrappers nest with every task, and a distributed one
        would go on reducing the gradients of the adapter before.
        """
        if self.is_fsdp_enabled:
            self._reshard()
        else:
            self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            self.model.__dict__.pop("_is_accelerate_prepared", None)  # or accelerate would not wrap it again
        if self.accelerator._models:  # otherwise there is nothing to free, and collecting garbage takes long
            self.accelerator.free_memory()
        self.model_wrapped = self.model
        if self._fsdp_modules():
            self.accelerator._models.append(self.model)  # or an evaluation would prepare it without an optimizer

    def _reshard(self) -> None:
        """
        Gives all modules their shards again. An evaluation leaves whole parameters behind, in the dtype of the forward
        pass, which would be written to in vain and saved with its rounding.
        """
        for module in self._fsdp_modules():
            module.reshard()

    def _fsdp_modules(self) -> list[Any]:
        if not self.is_fsdp_enabled:
            return []
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        self.shard()  # accelerate would want an optimizer for a model that has not been trained yet
        return super().evaluation_loop(*args, **kwargs)

    def note_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps which parameters an optimizer trains, for [`create_scheduler`], which runs after accelerate has it."""
        self._trained = [list(group["params"]) for group in optimizer.param_groups]

    def create_scheduler(self, num_training_steps: int, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        if self.is_fsdp_enabled:
            # accelerate looks the parameters up by address once more, and a process without a row of one has none
            for group, parameters in zip(self.optimizer.param_groups, self._trained, strict=True):
                group["params"] = parameters
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        published = self.task_callback and self.task_callback.sequence
        if not self.is_in_train and published and published.tasks:  # the sum of all tasks
            for file, data in (
                published.state_after(len(published.tasks), local=True).items() if self.args.should_save else ()
            ):
                write(folder / file, data)
            return
        self._reshard()
        adapter = {
            name: whole(parameter.detach()).cpu()
            for name, parameter in self.model.named_parameters()
            if f".{self.adapter}." in name  # its `modules_to_save` included
        }
        if self.args.should_save:
            self._save(str(folder), state_dict=adapter)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_whole_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_best_model()
        self._load_whole_adapter(self.state.best_model_checkpoint)

    def _load_whole_adapter(self, folder: str | None) -> None:
        path = Path(str(folder)) / ("" if self.adapter == "default" else self.adapter) / SAFETENSORS_WEIGHTS_NAME
        load_adapter(self.model, self.adapter, safetensors.torch.load_file(path))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.is_fsdp_enabled and checkpoint is not None and self.constraint is not None:
            # torch makes room for a sharded optimizer's state by a step at learning rate 0, which has moved ours
            self.constraint.load_state_dict(load_state(checkpoint))


def unsupported_launcher(name: str) -> str:
    """What to say of what cannot be used."""
    return (
        f"{name} is not supported: the constraint needs whole LoRA matrices in the optimizer, or shards that it can "
        "gather, and this splits or flattens them in another way. Use DistributedDataParallel (plain `torchrun` or "
        "`accelerate launch`) or FSDP2 (`fsdp_version: 2`)."
    )
