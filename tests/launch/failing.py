"""
Run by test_failing_processes.py under torchrun: two tasks, the second of which fails in some phase on one process.

The argument is JSON: `folder`, and either `phase` and `rank` of the failure, or `resume`.
"""

import json
import sys
from pathlib import Path

import torch

from eblora_hf import ContinualEBLoRATrainer
from eblora_hf.trainers import opening
from eblora_hf.trainers.callback import TaskSequenceCallback
from tests.support.tiny import accuracy, lora, make_arguments, make_model, make_text_data

options = json.loads(sys.argv[1])
folder = Path(options["folder"])
data = {name: make_text_data("bert", seed=i) for i, name in enumerate(("one", "two"))}


def fail_in(phase: str) -> None:
    if options.get("phase") == phase and torch.distributed.get_rank() == options["rank"] and learns_two():
        raise OSError("on purpose")


def learns_two() -> bool:
    return trainer.task_callback is not None and trainer.task_callback.sequence.names == ["one"]


class Failing(ContinualEBLoRATrainer):
    def snapshot(self, dataset, seed, of="gradients"):
        self.at = "start snapshot" if of == "gradients" else "end snapshot"
        return super().snapshot(dataset, seed, of)

    def _snapshot_loss(self, model, inputs):
        fail_in(self.at)
        return super()._snapshot_loss(model, inputs)

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            fail_in("step")
        return super().training_step(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        fail_in("evaluation")
        return super().prediction_step(*args, **kwargs)


trainer = Failing(
    model=make_model("bert"),
    args=make_arguments(
        folder / "out", per_device_train_batch_size=2, ddp_backend="gloo", save_strategy="steps", save_steps=2
    ),
    peft_config=lora(task_type="SEQ_CLS"),
    train_dataset=data,
    eval_dataset=data,
    compute_metrics=accuracy,
)
end_task, finish, begin = trainer.method.end_task, trainer.publisher.finish, TaskSequenceCallback.end_task


def failing_end_task(layers, snapshot, bases):
    fail_in("basis")
    return end_task(layers, snapshot, bases)


def failing_append(self, *args, **kwargs):
    fail_in("append")
    return begin(self, *args, **kwargs)


def failing_check(folder):
    if options.get("phase") == "opening":
        raise OSError("on purpose")


def failing_finish(sequence):
    if options.get("phase") == "publish" and torch.distributed.get_rank() == options["rank"]:
        raise OSError("on purpose")
    finish(sequence)


opening.check_links = failing_check  # on the process that writes
trainer.method.end_task = failing_end_task
TaskSequenceCallback.end_task = failing_append
trainer.publisher.finish = failing_finish
trainer.train(resume_from_checkpoint=True if options.get("resume") else None)
torch.distributed.destroy_process_group()
