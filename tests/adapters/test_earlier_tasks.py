"""Earlier tasks on the model while another one is learnt: merged or beside the weights, and taken off again."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from eblora_hf import EBLoRAConfig, PublishedSequence
from eblora_hf.adapters.composition import EARLIER_TASKS, compress
from eblora_hf.adapters.earlier_tasks import EarlierTasks
from eblora_hf.adapters.layers import find_layers
from eblora_hf.adapters.states import factors_of
from eblora_hf.manifold import maps
from eblora_hf.trainers import continual as trainer_module

from ..support.tiny import make_model, make_text_data, orthonormal
from ..support.trainers import make_trainer


def weights_of(model) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight.detach().clone() for layer in find_layers(model, "default")}


class Look(TrainerCallback):
    """What the model is like at the end of each task."""

    def __init__(self):
        self.weights, self.forms = [], []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights_of(model))
        self.forms.append(EARLIER_TASKS in model.peft_config)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_float32_weights_hold_the_earlier_tasks_and_come_back_bit_for_bit(tmp_path, kind):
    look = Look()
    trainer = make_trainer(tmp_path, kind=kind, callbacks=[look])
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert look.forms == [False, False]
    first = PublishedSequence.open(tmp_path).adapters(["one"])[0]
    a, b = factors_of(first, "lora_A"), factors_of(first, "lora_B")
    for layer in find_layers(trainer.model, "default"):
        assert torch.equal(look.weights[0][layer.name], before[layer.name])
        merged = before[layer.name].double() + layer.oriented(b[layer.name].double() @ a[layer.name].double())
        torch.testing.assert_close(look.weights[1][layer.name].double(), merged, atol=1e-7, rtol=1e-6)
    records = [
        json.loads((tmp_path / "tasks" / folder / "training.json").read_text()) for folder in ("00-one", "01-two")
    ]
    assert "earlier_tasks" not in records[0]
    assert records[1]["earlier_tasks"] == {"form": "merged"}


@pytest.mark.parametrize(
    "config",
    [
        EBLoRAConfig(method="keeplora"),
        EBLoRAConfig(method="olora"),
        EBLoRAConfig(snapshot_at="pretrained"),
    ],
    ids=["keeplora", "olora", "pretrained"],
)
def test_what_looks_at_the_weights_or_updates_themselves_finds_them_apart(tmp_path, config):
    look = Look()
    trainer = make_trainer(tmp_path, eblora_config=config, callbacks=[look])
    before = weights_of(trainer.model)
    trainer.train()
    assert look.forms == [False, True]
    assert all(torch.equal(look.weights[1][name], before[name]) for name in before)


def test_products_of_low_precision_find_them_apart_as_well(tmp_path, monkeypatch):
    """bf16 autocast rounds W + ΔW; for a W that was once bf16 most of a small ΔW is then gone."""
    for name, options in (("autocast", {"bf16": True}), ("tf32", {})):
        look = Look()
        if name == "tf32":
            monkeypatch.setattr(trainer_module, "multiplies_exactly", lambda: False)
        make_trainer(tmp_path / name, callbacks=[look], **options).train()
        assert look.forms == [False, True]


def test_whether_products_are_exact_is_read_from_torch():
    assert maps.multiplies_exactly()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not maps.multiplies_exactly()
    finally:
        torch.set_float32_matmul_precision(before)
    assert maps.multiplies_exactly()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_training_that_ends_half_way_leaves_the_weights_and_the_sum_of_tasks(tmp_path, error):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if "two" in args.output_dir and state.global_step == 2:
                raise error("on purpose")

    trainer = make_trainer(tmp_path, callbacks=[Stop()])
    before = weights_of(trainer.model)
    with pytest.raises(error, match="on purpose"):
        trainer.train()
    after = weights_of(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.model.active_adapters == ["default", EARLIER_TASKS]
    data = make_text_data("bert", size=4)[:4]
    for layer in trainer.layers:
        torch.nn.init.zeros_(layer.lora_B)
    reference = make_trainer(tmp_path / "other", train_dataset={"one": make_text_data("bert")})
    reference.train()
    with torch.no_grad():
        logits = [x.model.eval()(**data).logits for x in (trainer, reference)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


def concatenated(d_out: int, d_in: int, tasks: int) -> dict[str, torch.Tensor]:
    """Updates of rank 4 that overlap, with equal singular values each."""
    a = [orthonormal(d_in, 4, i, torch.float32).T for i in range(tasks)]
    b = [0.1 * 2.0**-i * orthonormal(d_out, 4, i + 50, torch.float32) for i in range(tasks)]
    key = "base_model.model.layer"
    return {f"{key}.lora_A.weight": torch.cat(a), f"{key}.lora_B.weight": torch.cat(b, dim=1)}


@pytest.mark.parametrize("error", [0.02, 0.1, 0.5])
def test_recompression_keeps_to_its_error_and_says_it(error):
    state = concatenated(40, 30, 5)
    smaller, said = compress(state, error)
    deltas = [
        x["base_model.model.layer.lora_B.weight"].double() @ x["base_model.model.layer.lora_A.weight"].double()
        for x in (state, smaller)
    ]
    actual = ((deltas[0] - deltas[1]).norm() / deltas[0].norm()).item()
    assert actual == pytest.approx(said, abs=1e-6)
    assert said <= error
    rank = len(smaller["base_model.model.layer.lora_A.weight"])
    sigma = torch.linalg.svdvals(deltas[0])
    assert sigma[rank - 1 :].norm() > error * sigma.norm()  # one direction less would be too few


def test_beside_bf16_weights_the_adapter_is_recompressed_and_the_record_says_so(tmp_path):
    ranks = []
    for name, error in (("exact", 0.0), ("error", 0.6)):
        config = EBLoRAConfig(earlier_tasks_error=error)
        tasks = {f"t{i}": make_text_data("bert", seed=i) for i in range(4)}
        model = make_model("bert", dtype=torch.bfloat16)
        trainer = make_trainer(
            tmp_path / name, model=model, bf16=True, eblora_config=config, train_dataset=tasks, max_steps=2
        )
        trainer.train()
        record = json.loads((tmp_path / name / "tasks" / "03-t3" / "training.json").read_text())["earlier_tasks"]
        assert record["form"] == "adapter"
        assert record["error"] <= error
        ranks.append(record["rank"])
    assert ranks[0] == 12  # 3 tasks of rank 4
    assert ranks[1] < ranks[0]


def test_an_error_makes_no_sense_for_olora():
    with pytest.raises(ValueError, match=r"earlier_tasks_error=0\.1.*as they are"):
        EBLoRAConfig(method="olora", earlier_tasks_error=0.1)
    with pytest.raises(ValueError, match=r"earlier_tasks_error=1\.0"):
        EBLoRAConfig(earlier_tasks_error=1.0)
    for wrong in (0, 2.5, "many"):
        with pytest.raises(ValueError, match=r"snapshot_sketch=.*expected a positive whole number"):
            EBLoRAConfig(snapshot_sketch=wrong)


def test_tasks_can_be_put_again_and_taken_off(tmp_path):
    trainer = make_trainer(tmp_path)
    layers = find_layers(trainer.model, "default")
    before = weights_of(trainer.model)
    state = {}
    for i, layer in enumerate(layers):
        key = f"base_model.model.{layer.name}"
        state[f"{key}.lora_A.weight"] = orthonormal(layer.d_in, 4, i, torch.float32).T.contiguous()
        state[f"{key}.lora_B.weight"] = orthonormal(layer.d_out, 4, i, torch.float32)
    for merge in (True, False):
        earlier = EarlierTasks(merge, 0.0)
        for _ in range(2):
            earlier.put(trainer.model, layers, state)
        assert (EARLIER_TASKS in trainer.model.peft_config) is not merge
        earlier.take_off(trainer.model)
        after = weights_of(trainer.model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert EARLIER_TASKS not in trainer.model.peft_config


def test_mixed_precision_of_the_launcher_counts(tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision bf16` says it in the environment, not in the arguments."""
    assert make_trainer(tmp_path).earlier_tasks.merge
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    try:
        assert not make_trainer(tmp_path).earlier_tasks.merge
    finally:
        AcceleratorState._reset_state()
