import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from eblora_hf.adapters.layers import find_layers

from ..support.tiny import lora, make_model


def layers_of(kind: str, **config):
    return find_layers(get_peft_model(make_model(kind), lora(**config)), "default")


@pytest.mark.parametrize(
    ("kind", "count", "some", "num_blocks"),
    [
        ("bert", 18, {"bert.encoder.layer.2.attention.self.query": 2}, 3),
        ("llama", 14, {"model.layers.0.self_attn.q_proj": 0, "model.layers.1.mlp.down_proj": 1}, 2),
        ("gpt2", 8, {"transformer.h.1.attn.c_attn": 1, "transformer.h.0.mlp.c_fc": 0}, 2),
        # encoder and decoder are one chain
        ("t5", 32, {"encoder.block.1.layer.0.SelfAttention.q": 1, "decoder.block.0.layer.1.EncDecAttention.k": 2}, 4),
        ("vit", 24, {}, 4),  # whose names differ from release to release
    ],
)
def test_names_and_depth(kind, count, some, num_blocks):
    target = ["q", "k", "v", "o", "wi", "wo"] if kind == "t5" else "all-linear"
    found = layers_of(kind, target_modules=target)
    in_blocks = {layer.name: layer for layer in found if layer.depth is not None}
    assert len(in_blocks) == count
    for name, depth in some.items():
        assert in_blocks[name].depth == depth
    assert all(layer.num_blocks == num_blocks for layer in in_blocks.values())
    assert {layer.depth for layer in in_blocks.values()} == set(range(num_blocks))


def test_outside_any_block_depth_is_none():
    by_name = {layer.name: layer for layer in layers_of("bert")}
    assert by_name["bert.pooler.dense"].depth is None


def test_llava_counts_the_blocks_of_the_language_model_alone():
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 60,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        image_token_index=59,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    peft_model = get_peft_model(model, lora(target_modules=r".*language_model.*\.(q_proj|down_proj)"))
    found = find_layers(peft_model, "default")
    assert [layer.depth for layer in found] == [0, 0, 1, 1, 2, 2]
    assert found[0].num_blocks == 3
    assert found[0].name.endswith("language_model.layers.0.self_attn.q_proj")


def test_some_layers_only_keep_the_depth_of_the_model():
    found = layers_of("bert", target_modules=["query"], layers_to_transform=[2], layers_pattern="layer")
    assert [(layer.depth, layer.num_blocks) for layer in found] == [(2, 3)]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_orientation_and_scaling(kind):
    """ΔW = γ B A in the orientation (d_out, d_in), for Linear and Conv1D alike."""
    for layer in layers_of(kind, target_modules=["query", "dense"] if kind == "bert" else ["c_attn", "c_fc"]):
        nn.init.normal_(layer.lora_B)
        x = torch.randn(2, layer.d_in)
        expected = x @ layer.oriented(layer.weight).T + layer.module.get_base_layer().bias
        expected = expected + layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T
        torch.testing.assert_close(layer.module(x), expected, atol=1e-5, rtol=1e-5)


def test_scaling_follows_alpha_rslora_and_patterns():
    found = layers_of(
        "bert", target_modules=["query", "key"], use_rslora=True, rank_pattern={"key": 2}, alpha_pattern={"key": 6}
    )
    scaling = {layer.name.rsplit(".", 1)[1]: (layer.rank, layer.scaling) for layer in found}
    assert scaling == {"query": (4, pytest.approx(8 / 4**0.5)), "key": (2, pytest.approx(6 / 2**0.5))}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora=….*DoRA rescales"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*changes the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens: LoRA on Embedding"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        layers_of("llama", **options)


def test_convolutions_and_tied_weights_are_refused():
    with pytest.raises(ValueError, match="projection: LoRA on Conv2d"):
        layers_of("vit", target_modules=["projection"])
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"lm_head: LoRA on a tied weight.*embed_tokens"):
        find_layers(get_peft_model(model, lora(target_modules=["lm_head"])), "default")


def test_unknown_adapter_and_merged_adapter():
    model = get_peft_model(make_model("bert"), lora())
    with pytest.raises(ValueError, match=r"no adapter 'mine', only \['default'\]"):
        find_layers(model, "mine")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        find_layers(model, "default")


def test_gaussian_init_is_fine():
    config = LoraConfig(r=4, target_modules=["query"], init_lora_weights="gaussian")
    assert len(find_layers(get_peft_model(make_model("bert"), config), "default")) == 3


def test_layers_derived_for_other_weights_are_refused():
    """PEFT derives its class for torchao from the one for plain weights."""
    model = get_peft_model(make_model("bert"), lora())
    module = find_layers(model, "default")[0].module
    module.__class__ = type("TorchaoLoraLinear", (type(module),), {"__module__": "peft.tuners.lora.torchao"})
    with pytest.raises(ValueError, match=r"TorchaoLoraLinear\) is not supported"):
        find_layers(model, "default")
