"""A LoRA that was trained elsewhere becomes the first task, exactly; what is protected of it."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence, load_sequence

from ..support.tiny import accuracy, lora, make_arguments, make_model, make_text_data
from ..support.trainers import CONFIG, InterruptAt, InterruptionError, assert_same_files, load_published

INPUTS = {"input_ids": torch.arange(3, 27).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


@pytest.fixture
def plain(tmp_path):
    """A LoRA with every option that changes its scaling, and a head."""
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["query", "value"],
        rank_pattern={"layer.1.attention.self.query": 2},
        alpha_pattern={"layer.2.attention.self.value": 5},
        use_rslora=True,
        task_type="SEQ_CLS",
    )
    model = get_peft_model(make_model("bert"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "my plain lora"
    model.save_pretrained(folder)
    return folder


def continues(plain, folder, callbacks=(), resume=None, **options):
    trainer = ContinualEBLoRATrainer(
        args=make_arguments(folder, save_strategy="steps", save_steps=2),
        sequence=plain,
        callbacks=list(callbacks),
        **({"model": make_model("bert"), "train_dataset": {"next": make_text_data("bert", seed=1)}} | options),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("protect", [True, False], ids=["data", "adapter"])
def test_it_is_the_first_task_exactly(tmp_path, plain, protect):
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    data = make_text_data("bert") if protect else None
    trainer = continues(plain, tmp_path / "out", protect_data=data)
    sequence = PublishedSequence.open(tmp_path / "out")
    assert sequence.names == ["my-plain-lora", "next"]
    expected = logits(PeftModel.from_pretrained(make_model("bert"), plain))
    found = logits(load_sequence(make_model("bert"), tmp_path / "out", upto="my-plain-lora"))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    bases = {name: basis for name, basis in trainer.bases.items() if basis.shape[1]}
    assert len(bases) == 6
    for name, extension in load_file(tmp_path / "out/tasks/00-my-plain-lora/subspace.safetensors").items():
        if not name.endswith(".columns") or not extension.shape[1]:
            continue
        second = sequence.adapters(["next"])[0][f"base_model.model.{name.removesuffix('.columns')}.lora_A.weight"]
        assert (second @ extension.float()).abs().max() < 5e-3  # the next task stays out of it, but for bf16 on disk
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == before
    assert str(tmp_path) not in json.dumps(sequence.training())


def test_its_directions_are_those_of_its_update(tmp_path, plain):
    trainer = continues(plain, tmp_path / "out", eblora_config=EBLoRAConfig(energy_threshold=1.0))
    adapter = PublishedSequence.open(tmp_path / "out").adapters(["my-plain-lora"])[0]
    columns = load_file(tmp_path / "out/tasks/00-my-plain-lora/subspace.safetensors")
    for layer in trainer.layers:
        a = adapter[f"base_model.model.{layer.name}.lora_A.weight"].double()
        basis = columns[f"{layer.name}.columns"].double()
        assert basis.shape[1] == len(a)
        assert (a - a @ basis @ basis.T).norm() < 5e-3 * a.norm()  # bf16 on disk


def test_it_is_said_that_the_adapter_alone_protects_little(tmp_path, plain, caplog):
    continues(plain, tmp_path / "out")
    assert "hardly protects it" in caplog.text
    caplog.clear()
    continues(plain, tmp_path / "other", protect_data=make_text_data("bert"))
    assert "hardly protects it" not in caplog.text


def test_interrupted_and_resumed_is_the_same(tmp_path, plain):
    continues(plain, tmp_path / "whole")
    with pytest.raises(InterruptionError):
        continues(plain, tmp_path / "parts", [InterruptAt("next", 3)])
    continues(plain, tmp_path / "parts", resume=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))


def test_methods_without_a_basis_take_it_too(tmp_path, plain):
    continues(plain, tmp_path / "out", eblora_config=EBLoRAConfig(method="lora"))
    assert PublishedSequence.open(tmp_path / "out").names_without_basis() == ["my-plain-lora", "next"]


def test_means_and_card_say_what_they_leave_out(tmp_path, plain, caplog):
    sets = {"next": make_text_data("bert", seed=1)}
    trainer = continues(plain, tmp_path / "out", eval_dataset=sets, compute_metrics=accuracy)
    assert trainer.continual_metrics()["MFN"] == trainer.accuracy_matrix[1, 1]
    assert "Not all of my-plain-lora was measured: means are over what was" in caplog.text
    assert "which not all of my-plain-lora was" in (tmp_path / "out/README.md").read_text()


def test_it_is_measured_without_training(tmp_path, plain):
    data = make_text_data("bert")
    trainer = ContinualEBLoRATrainer(
        model=make_model("bert"),
        args=make_arguments(tmp_path / "out"),
        sequence=plain,
        eval_dataset=data,
        compute_metrics=accuracy,
    )
    torch.testing.assert_close(
        torch.tensor(trainer.predict(data).predictions),
        PeftModel.from_pretrained(make_model("bert"), plain).eval()(**data[:]).logits.detach(),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_config": lora(target_modules=["query"], task_type="SEQ_CLS")}, "adapt the same layers"),
        ({"peft_config": lora(target_modules=["query", "value"])}, "has trained classifier"),
        ({"model": make_model("llama")}, "Load the base model|not found in the base model"),
    ],
    ids=["layers", "head", "model"],
)
def test_what_does_not_fit_is_refused(tmp_path, plain, options, words):
    with pytest.raises(ValueError, match=words):
        continues(plain, tmp_path / "out", **options)
    assert not (tmp_path / "out/eblora_sequence.json").exists()


def test_it_is_never_replaced_and_what_is_none_is_named(tmp_path, plain):
    with pytest.raises(ValueError, match="holds an adapter that is not of a sequence and would be replaced"):
        continues(plain, plain)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds neither a sequence .* nor a LoRA adapter"):
        continues(tmp_path / "empty", tmp_path / "out")
    content = json.loads((plain / "adapter_config.json").read_text()) | {"use_dora": True}
    (plain / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not plain LoRA"):
        continues(plain, tmp_path / "out", peft_config=lora(**CONFIG))
