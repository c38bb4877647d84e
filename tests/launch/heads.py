"""
Run by test_processes.py under torchrun: FSDP2 with a trained head and evaluations between checkpoints, which leave
whole parameters behind, in the precision of the forward pass.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.launch.fsdp2 import FSDP2OnCPU
from tests.support.architectures import ARCHITECTURES
from tests.support.contract import keep_contract
from tests.support.tiny import accuracy

folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
writers = set()


class Sharded(FSDP2OnCPU):
    blocks = ARCHITECTURES["BERT"].blocks

    def _save(self, output_dir=None, state_dict=None):
        writers.add(self.args.process_index)
        super()._save(output_dir, state_dict)


def evaluated(defaults):
    return {"eval_dataset": defaults["train_dataset"], "compute_metrics": accuracy}


trainer = keep_contract(
    "BERT",
    "bf16 autocast",
    folder,
    (Sharded,),
    options=evaluated,
    load_best_model_at_end=True,
    metric_for_best_model="loss",
    eval_strategy="steps",
    save_strategy="steps",
    eval_steps=1,
    save_steps=1,
    max_steps=3,
    per_device_train_batch_size=2,
    ddp_backend="gloo",
)
assert writers <= {0}
assert trainer.accuracy_matrix.shape == (2, 2)
assert (trainer.accuracy_matrix >= 0).all()
for path in (folder / "out" / "checkpoints").glob("*/checkpoint-*/adapter_model.safetensors"):
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}, path
assert set(trainer.evaluate()) & {"eval_one_accuracy"}
torch.distributed.destroy_process_group()
