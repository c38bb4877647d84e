"""What `disable_adapter` and `set_adapter` mean while a task is learnt, under every precision."""

import pytest
import torch
from transformers import TrainerCallback

from eblora_hf import EBLoRAConfig, load_sequence

from ..support.tiny import lora, make_model, make_text_data
from ..support.trainers import make_trainer

INPUTS = {"input_ids": torch.arange(3, 27).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
DTYPES = [torch.float32, torch.bfloat16]


def logits(model):
    training = model.training
    with torch.no_grad():
        result = model.eval()(**INPUTS).logits
    model.train(training)
    return result


class Look(TrainerCallback):
    """Does something to the model in the middle of each task."""

    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            self.look(model, args.output_dir.rpartition("/")[2])


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["eblora", "keeplora"])
def test_disabled_is_the_model_before_the_task(tmp_path, dtype, method):
    """With the heads of the tasks before, and with nothing trained afterwards that was not before."""
    found = {}

    def look(model, task):
        before = flags(model)
        with model.disable_adapter():
            found[task] = logits(model)
        with trainer.pretrained_model():
            found[f"{task} pre-trained"] = logits(model)
        assert flags(model) == before
        assert not torch.equal(logits(model), found[task])

    trainer = make_trainer(
        tmp_path,
        model=make_model("bert", dtype=dtype),
        peft_config=lora(task_type="SEQ_CLS"),
        callbacks=[Look(look)],
        eblora_config=EBLoRAConfig(method=method, scale_lr=0.05),
    )
    base = logits(make_model("bert", dtype=dtype))
    trainer.train()
    for name in ("one", "one pre-trained", "two pre-trained"):
        assert torch.equal(found[name], base), name
    after_one = logits(load_sequence(make_model("bert", dtype=dtype), tmp_path, upto="one"))
    exact = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(found["two"], after_one, **exact)
    with trainer.model.disable_adapter():  # after the run PEFT's own
        assert torch.equal(logits(trainer.model), base)


SWITCHES = {
    "set_adapter": lambda model: model.set_adapter("default"),
    "base_model.set_adapter": lambda model: model.base_model.set_adapter("default"),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "unfreeze": lambda model: model.base_model.enable_adapter_layers(),
    "freeze": lambda model: model.set_requires_grad("default", False),
    "disable": lambda model: model.disable_adapter().__enter__(),
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_callback_switches_changes_nothing(tmp_path, dtype, name):
    def trained(folder, callbacks):
        trainer = make_trainer(folder, model=make_model("bert", dtype=dtype), callbacks=callbacks)
        trainer.train()
        return trainer.task_callback.sequence.adapters()

    switched = trained(tmp_path / "switched", [Look(lambda model, task: SWITCHES[name](model))])
    left_alone = trained(tmp_path / "alone", [])
    for one, other in zip(switched, left_alone, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_it_is_said_that_something_was_switched_back(tmp_path, caplog):
    make_trainer(tmp_path, callbacks=[Look(lambda model, task: model.base_model.disable_adapter_layers())]).train()
    assert "were switched off" in caplog.text
    assert "with trainer.pretrained_model():" in caplog.text


def test_what_is_measured_within_a_context_is_its_model(tmp_path):
    found = {}
    data = make_text_data("bert", size=8)

    def look(model, task):
        for name, context in (("before", model.disable_adapter), ("pre-trained", trainer.pretrained_model)):
            with context():
                with torch.no_grad():
                    expected = model.eval()(**data[:]).logits
                found[name] = (expected, torch.tensor(trainer.predict(data).predictions))

    trainer = make_trainer(tmp_path, callbacks=[Look(look)])
    trainer.train()
    for expected, predicted in found.values():
        torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-5)


def test_the_pretrained_model_first_and_then_the_sequence(tmp_path):
    data = make_text_data("bert", size=8)
    make_trainer(tmp_path).train()
    trainer = make_trainer(tmp_path, sequence=tmp_path, tasks=("three",))
    with trainer.pretrained_model():
        assert torch.equal(
            torch.tensor(trainer.predict(data).predictions), make_model("bert").eval()(**data[:]).logits
        )
    expected = load_sequence(make_model("bert"), tmp_path)(**data[:]).logits
    torch.testing.assert_close(torch.tensor(trainer.predict(data).predictions), expected, atol=1e-5, rtol=1e-5)
