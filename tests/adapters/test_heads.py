"""What of a model is pre-trained, and what are heads on top of it."""

import pytest
import transformers
from peft import get_peft_model
from torch import nn

from eblora_hf.adapters.heads import pretrained_part

from ..support.tiny import lora

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def make(name):
    if name == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **SMALL))
    if name == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
        return transformers.DistilBertForSequenceClassification(config)
    if name == "llama":
        config = transformers.LlamaConfig(vocab_size=20, **SMALL)
        return transformers.LlamaForSequenceClassification(config)
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config={"vocab_size": 20, **SMALL}, vision_config=vision)
    return transformers.CLIPForImageClassification(config)


@pytest.mark.parametrize(
    ("kind", "heads", "part"),
    [
        ("bert", ["classifier"], "bert"),
        ("distilbert", ["pre_classifier", "classifier"], "distilbert"),
        ("distilbert", ["classifier"], "distilbert"),  # named by `base_model_prefix`, whatever is beside it
        ("llama", ["score"], "model"),
        ("clip", ["classifier"], "vision_model"),  # its prefix, `clip`, is of another model
    ],
)
def test_the_pre_trained_part(kind, heads, part):
    model = make(kind)
    assert pretrained_part(model, heads) is getattr(model, part)
    wrapped = get_peft_model(
        model, lora(modules_to_save=heads, exclude_modules=[*heads, "pre_classifier"], r=2)
    ).get_base_model()
    assert pretrained_part(wrapped, heads) is getattr(wrapped, part)


def test_where_it_is_not_known_there_is_none():
    several = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    assert pretrained_part(several, ["classifier"]) is None
    assert pretrained_part(several, ["classifier", "two"]) is several["one"]
