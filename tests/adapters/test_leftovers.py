"""What a failed run leaves on a model is taken off by the next: earlier tasks count once, whoever goes on."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from eblora_hf import EBLoRAConfig

from ..support.tiny import lora, make_model
from ..support.trainers import CONFIG, assert_same_files, load_published, make_trainer

TASKS = ("one", "two", "three")


class FailOnce(TrainerCallback):
    """Fails at a step of a task, the first time."""

    def __init__(self, task: str, step: int, error: type[BaseException] = OSError):
        self.task, self.step, self.error, self.failed = task, step, error, False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.failed and args.output_dir.endswith(self.task) and state.global_step == self.step:
            self.failed = True
            raise self.error("the node went away")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder, tasks=TASKS).train()
    return load_published(folder)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("save_strategy", ["steps", "no"])
@pytest.mark.parametrize("task", ["one", "three"])
def test_the_same_trainer_resumes_as_if_nothing_had_happened(tmp_path, undisturbed, task, save_strategy, error):
    trainer = make_trainer(
        tmp_path, tasks=TASKS, save_strategy=save_strategy, save_steps=1, callbacks=[FailOnce(task, 3, error)]
    )
    with pytest.raises(error):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path), undisturbed)


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
@pytest.mark.parametrize("task", ["one", "three"])
@pytest.mark.parametrize("given", ["base", "PeftModel"])
def test_a_new_trainer_on_the_same_model_resumes_likewise(tmp_path, undisturbed, task, save_strategy, given):
    """As when the cells of a notebook run again."""
    model, options = make_model("bert"), {"tasks": TASKS, "save_strategy": save_strategy, "save_steps": 1}
    if given == "PeftModel":
        model, options["peft_config"] = get_peft_model(model, lora(**CONFIG)), None
    with pytest.raises(OSError, match="node"):
        make_trainer(tmp_path, model=model, callbacks=[FailOnce(task, 3)], **options).train()
    trainer = make_trainer(tmp_path, model=model, **options)
    trainer.train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path), undisturbed)
    assert list(trainer.model.peft_config) == ["default"]


@pytest.mark.parametrize("merge", ["float32", "bf16"])
def test_another_sequence_on_the_same_model_starts_afresh(tmp_path, merge):
    """After a failed run, and after one that came to its end."""
    dtype = torch.float32 if merge == "float32" else torch.bfloat16
    make_trainer(tmp_path / "reference", model=make_model("bert", dtype=dtype)).train()
    model = make_model("bert", dtype=dtype)
    with pytest.raises(OSError, match="node"):
        make_trainer(tmp_path / "failed", model=model, callbacks=[FailOnce("two", 3)]).train()
    for name in ("first", "second"):
        make_trainer(tmp_path / name, model=model).train()
        assert_same_files(load_published(tmp_path / name), load_published(tmp_path / "reference"))


def test_a_head_starts_where_it_was(tmp_path):
    """A classifier in `modules_to_save` is not trained on from a run that left nothing else."""
    config = lora(modules_to_save=["classifier"], target_modules=["query", "value"])
    options = {"peft_config": config, "eblora_config": EBLoRAConfig(method="lora")}
    make_trainer(tmp_path / "reference", **options).train()
    trainer = make_trainer(tmp_path / "out", callbacks=[FailOnce("one", 3)], **options)
    with pytest.raises(OSError, match="node"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    name = "tasks/01-two/adapter_model.safetensors"
    assert torch.equal(
        load_file(tmp_path / "out" / name)["base_model.model.classifier.weight"],
        load_file(tmp_path / "reference" / name)["base_model.model.classifier.weight"],
    )


def test_layers_that_others_have_put_there_are_refused(tmp_path):
    base = make_model("bert")
    get_peft_model(base, lora(**CONFIG))
    with pytest.raises(ValueError, match=r"has LoRA layers .*peft_model\.unload\(\)"):
        make_trainer(tmp_path, model=base)
