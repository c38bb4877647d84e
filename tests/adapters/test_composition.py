"""Sums of updates: stacked, concatenated and computed by hand are the same."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from eblora_hf.adapters.composition import (
    EARLIER_TASKS,
    concatenate,
    folded_adapter,
    merge_into_base,
    put_earlier_tasks,
    replace_adapter,
)
from eblora_hf.adapters.layers import find_layers
from eblora_hf.adapters.spectra import mean_sigma_ratio, singular_values
from eblora_hf.adapters.states import folded_config

from ..support.tiny import lora, make_model, make_text_data, orthonormal


def trained_model(seed: int, kind="bert", **config):
    """A model whose adapter holds a random update."""
    torch.manual_seed(seed)
    model = get_peft_model(make_model(kind), lora(**config)).eval()
    for layer in find_layers(model, "default"):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def adapter_of(model):
    return folded_adapter(model, find_layers(model, "default"))


def logits(model, kind="bert"):
    with torch.no_grad():
        return model.eval()(**make_text_data(kind, seed=3)[:4]).logits


CONFIGS = [
    {},
    {"use_rslora": True, "lora_alpha": 3},
    {"rank_pattern": {"query": 2, "value": 7}, "alpha_pattern": {"value": 1}},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_stacked_concatenated_and_merged_models_agree(kind, config):
    config = config if kind == "bert" else {key: value for key, value in config.items() if "pattern" not in key}
    models = [trained_model(seed, kind, **config) for seed in range(3)]
    adapters = [adapter_of(model) for model in models]
    # by hand: base plus the three updates, through PEFT's own arithmetic
    expected = make_model(kind)
    for model in models:
        for layer in find_layers(model, "default"):
            delta = layer.module.get_delta_weight("default")
            expected.get_submodule(layer.name).weight.data += delta
    stacked = models[2]
    put_earlier_tasks(stacked, "default", concatenate(adapters[:2]))
    assert stacked.active_adapters == ["default", EARLIER_TASKS]
    torch.testing.assert_close(logits(stacked, kind), logits(expected, kind), atol=1e-5, rtol=1e-5)
    trainable = [name for name, parameter in stacked.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".default." in name for name in trainable)
    replace_adapter(stacked, "default", concatenate(adapters))
    assert list(stacked.peft_config) == ["default"]
    torch.testing.assert_close(logits(stacked, kind), logits(expected, kind), atol=1e-5, rtol=1e-5)


def test_earlier_tasks_can_be_put_again_and_again():
    adapters = [adapter_of(trained_model(seed)) for seed in range(3)]
    model = trained_model(9)
    for count in (1, 2, 3):
        put_earlier_tasks(model, "default", concatenate(adapters[:count]))
    assert sorted(model.peft_config) == ["default", EARLIER_TASKS]
    direct = trained_model(9)
    put_earlier_tasks(direct, "default", concatenate(adapters))
    assert torch.equal(logits(model), logits(direct))


def test_heads_come_from_the_last_task():
    adapters = []
    for seed in range(2):
        model = trained_model(seed, task_type="SEQ_CLS")
        torch.nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].weight)
        adapters.append(adapter_of(model))
    fresh = trained_model(5, task_type="SEQ_CLS")
    put_earlier_tasks(fresh, "default", concatenate(adapters))
    head = fresh.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(head.weight, model.get_base_model().classifier.modules_to_save["default"].weight)
    assert head.weight.requires_grad
    replace_adapter(fresh, "default", concatenate(adapters))
    head = fresh.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(head.weight, model.get_base_model().classifier.modules_to_save["default"].weight)


def test_folded_configuration():
    model = trained_model(0, rank_pattern={"query": 2}, use_rslora=True, lora_dropout=0.3)
    config = folded_config(model.peft_config["default"], adapter_of(model))
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (4, 4, False, 0.0)
    assert set(config.rank_pattern.values()) == {2}
    assert config.rank_pattern == config.alpha_pattern
    assert model.peft_config["default"].use_rslora  # the original is left alone


def test_other_layers_are_refused_by_name():
    a = adapter_of(trained_model(0, target_modules=["query"]))
    b = adapter_of(trained_model(0, target_modules=["key"]))
    with pytest.raises(ValueError, match=r"must adapt the same layers.*layer.0.attention.self.key"):
        concatenate([a, b])
    with pytest.raises(ValueError, match=r"does not fit the model, which has no"):
        replace_adapter(trained_model(0, target_modules=["key"]), "default", a)


def test_spectra_against_a_full_decomposition():
    model = trained_model(0)
    spectra = singular_values(adapter_of(model))
    for layer in find_layers(model, "default"):
        delta = layer.module.get_delta_weight("default").double()
        torch.testing.assert_close(
            spectra[layer.name], torch.linalg.svdvals(delta)[: layer.rank], atol=1e-6, rtol=1e-5
        )
    u, v = orthonormal(8, 2), orthonormal(9, 2)
    prefix = "base_model.model.x"
    balanced = {f"{prefix}.lora_B.weight": -0.3 * u, f"{prefix}.lora_A.weight": v.T}
    assert mean_sigma_ratio([balanced]) == pytest.approx([1.0, 1.0])
    uneven = {f"{prefix}.lora_B.weight": u * torch.tensor([4.0, 1.0]), f"{prefix}.lora_A.weight": v.T}
    assert mean_sigma_ratio([uneven]) == pytest.approx([1.0, 0.25])
    zero = {key: torch.zeros_like(value) for key, value in balanced.items()}
    with pytest.raises(ValueError, match="None of the adapters holds an update"):
        mean_sigma_ratio([zero])


def test_merging_is_exact_in_float32_and_refused_below():
    model = trained_model(0)
    expected = logits(model)
    merged = merge_into_base(model)
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    low = get_peft_model(make_model("bert", dtype=torch.bfloat16), lora(target_modules=["query"]))
    for layer in find_layers(low, "default"):
        torch.nn.init.normal_(layer.lora_B, std=1e-4)  # far below the weights' last place
    weights = {layer.name: layer.weight.clone() for layer in find_layers(low, "default")}
    with pytest.raises(
        ValueError, match=r"Merging into torch.bfloat16 weights keeps \d+\.\d% of the update.*allow_lossy=True"
    ):
        merge_into_base(low)
    assert all(torch.equal(layer.weight, weights[layer.name]) for layer in find_layers(low, "default"))


def test_a_lossy_merge_states_what_is_really_kept(caplog):
    model = get_peft_model(make_model("bert", dtype=torch.bfloat16), lora(target_modules=["query"]))
    deltas, before = {}, {}
    for layer in find_layers(model, "default"):
        torch.nn.init.normal_(layer.lora_B, std=1e-3)
        deltas[layer.name] = layer.module.get_delta_weight("default").float()
        before[layer.name] = layer.weight.float().clone()
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            transformers.utils.logging.set_verbosity_warning()
            merged = merge_into_base(model, allow_lossy=True)
    finally:
        transformers.utils.logging.disable_propagation()
        transformers.utils.logging.set_verbosity_error()
    kept = [
        (((merged.get_submodule(name).weight.float() - before[name]) * delta).sum() / delta.square().sum()).item()
        for name, delta in deltas.items()
    ]
    assert f"keeps {sum(kept) / len(kept):.1%} of the update on average, {min(kept):.1%} in the worst" in caplog.text


@pytest.mark.parametrize(("s", "share"), [(0.005, 0.29), (0.02, 0.81), (0.1, 1.0)])
def test_how_much_bf16_weights_keep_of_a_balanced_update(s, share):
    """Why earlier tasks ride along instead of being merged: at the size updates have in large models, most is lost."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(2048, 2048, bias=False))
    torch.nn.init.normal_(base[0].weight, std=0.02)
    model = get_peft_model(base.to(torch.bfloat16), LoraConfig(r=16, lora_alpha=16, target_modules=["0"]))
    (layer,) = find_layers(model, "default")
    layer.lora_A.data = orthonormal(2048, 16, 1, torch.float32).T.contiguous()
    layer.lora_B.data = s * orthonormal(2048, 16, 2, torch.float32)
    with pytest.raises(ValueError, match="keeps") as error:
        merge_into_base(model)
    kept = float(str(error.value).split("keeps ")[1].split("%")[0]) / 100
    assert kept == pytest.approx(share, abs=0.06)
