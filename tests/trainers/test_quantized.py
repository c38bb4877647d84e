"""4- and 8-bit bases of bitsandbytes: their gradients, their weights, and what training does to them."""

import pytest
import torch
import transformers
from peft import PeftModel, prepare_model_for_kbit_training

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence, load_sequence, merge_into_base
from eblora_hf.adapters.layers import find_layers, keep_differentiable
from eblora_hf.memory.gradients import mean_gradients
from eblora_hf.published.identity import describe_base_model

from ..support.architectures import ARCHITECTURES
from ..support.contract import load
from ..support.tiny import lora, make_arguments

LLAMA = ARCHITECTURES["Llama"]
BITS = ["8-bit base", "4-bit base"]


def quantized(precision, folder) -> PeftModel:
    model = load(LLAMA, precision, folder)
    keep_differentiable(model)
    return PeftModel(model, lora()).eval()


def loss(model, inputs):
    return model(**inputs).loss


def assert_gradients_are_those_of_autograd(model: PeftModel, precision: str) -> None:
    """On a float32 model that holds the dequantized weights."""
    layers, dense = find_layers(model, "default"), LLAMA.make().eval()
    for layer in layers:
        dense.get_submodule(layer.name).weight.data = layer.dense_weight().clone()
    batches = [LLAMA.batch(seed) for seed in (1, 2)]
    means = mean_gradients(model.eval(), layers, [(batch, 4) for batch in batches], loss)
    sum(loss(dense, batch) / 2 for batch in batches).backward()
    close = 1e-4 if precision == "4-bit base" else 0.05  # the products of 8 bits are rounded to 8 bits themselves
    for layer in layers:
        expected = dense.get_submodule(layer.name).weight.grad
        assert (means[layer.name] - expected).norm() <= close * expected.norm(), layer.name


@pytest.mark.parametrize("precision", BITS)
def test_gradients_are_those_of_the_weights_that_the_layers_compute_with(tmp_path, precision):
    model, original = quantized(precision, tmp_path), LLAMA.make()
    for layer in find_layers(model, "default"):
        weight = original.get_submodule(layer.name).weight
        assert 0 < (layer.dense_weight() - weight).abs().max() < 0.2 * weight.abs().max()
    assert_gradients_are_those_of_autograd(model, precision)


@pytest.mark.parametrize("precision", BITS)
def test_an_evaluation_does_not_stop_gradients(tmp_path, precision):
    """On some processors bitsandbytes packs 4-bit weights when they are evaluated, and no gradient passes then."""
    model = load(LLAMA, precision, tmp_path)
    with torch.no_grad():
        model.eval()(**LLAMA.batch())
    trainer = ContinualEBLoRATrainer(
        model=model,
        args=make_arguments(tmp_path / "out", max_steps=2),
        peft_config=lora(),
        train_dataset=LLAMA.data(0),
        data_collator=LLAMA.collate,
    )
    assert_gradients_are_those_of_autograd(trainer.model, precision)
    with torch.no_grad():
        trainer.model.eval()(**LLAMA.batch())
    assert_gradients_are_those_of_autograd(trainer.model, precision)


@pytest.mark.parametrize("method", ["keeplora", "inflora", "olora", "osf", "ebo", "lora"])
@pytest.mark.parametrize("precision", BITS)
def test_every_method(tmp_path, precision, method):
    trainer = ContinualEBLoRATrainer(
        model=prepare_model_for_kbit_training(load(LLAMA, precision, tmp_path), use_gradient_checkpointing=False),
        args=make_arguments(tmp_path / "out", max_steps=2),
        peft_config=lora(),
        eblora_config=EBLoRAConfig(method=method),
        train_dataset={name: LLAMA.data(seed) for seed, name in enumerate(("one", "two"))},
        data_collator=LLAMA.collate,
    )
    trainer.train()
    assert PublishedSequence.open(tmp_path / "out").names == ["one", "two"]


@pytest.mark.parametrize("precision", BITS)
def test_a_sequence_goes_on_in_another_precision(tmp_path, precision):
    """It is the same base model, whatever the shape its weights are packed in."""
    described = describe_base_model(load(LLAMA, precision, tmp_path))
    assert described["fingerprint"] == describe_base_model(LLAMA.make())["fingerprint"]
    assert described["weights"] is None
    for name, model in (("one", load(LLAMA, precision, tmp_path)), ("two", LLAMA.make())):
        ContinualEBLoRATrainer(
            model=model,
            args=make_arguments(tmp_path / "out", max_steps=2),
            peft_config=lora(),
            train_dataset=LLAMA.data(0),
            data_collator=LLAMA.collate,
            task_name=name,
            sequence=None if name == "one" else tmp_path / "out",
        ).train()
    model = load_sequence(load(LLAMA, precision, tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match=r"14 layers are quantized .*Keep the adapter unmerged"):
        merge_into_base(model, allow_lossy=True)


def test_quantized_heads_are_refused_by_name(tmp_path):
    architecture = ARCHITECTURES["BERT"]
    architecture.make().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["nothing"])
    model = architecture.model.from_pretrained(tmp_path, quantization_config=config)
    for peft_config in (architecture.peft_config(), lora(task_type="SEQ_CLS")):  # which adds the head by itself
        with pytest.raises(ValueError, match=r"^classifier is to be .* quantized.*skip_modules=\['classifier'\]"):
            ContinualEBLoRATrainer(
                model=model,
                args=make_arguments(tmp_path / "out"),
                peft_config=peft_config,
                train_dataset=architecture.data(0),
            )
