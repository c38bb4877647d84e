"""FSDP2 on CPUs."""

from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType


class FSDP2OnCPU:
    """
    Goes before a trainer class: makes accelerate shard the model by `fully_shard` over gloo.

    On CPUs accelerate ignores that FSDP was asked for. Told here that it was, it takes the path of a GPU run from
    `Accelerator.prepare` on, and the Trainer with it. `blocks` names the classes to shard, where it cannot tell them.
    """

    blocks: list[str] | None = None
    version = 2

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=self.version,
            transformer_cls_names_to_wrap=self.blocks,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        self.is_fsdp_enabled = True
