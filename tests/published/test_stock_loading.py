"""The published folder and repository load as users of transformers and PEFT load them."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from eblora_hf import ContinualEBLoRATrainer, PublishedSequence, load_sequence, push_sequence
from eblora_hf.published.identity import describe_base_model
from eblora_hf.published.loading import fetch_sequence

from ..support.children import run_script
from ..support.tiny import lora, make_arguments, make_model, make_text_data

WORDS = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(58))]


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def base(tmp_path):
    """A base model in a folder, with its tokenizer."""
    make_model("bert").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(folder, source, tasks=("one", "two"), **options):
    trainer = ContinualEBLoRATrainer(
        model=transformers.AutoModelForSequenceClassification.from_pretrained(source),
        args=make_arguments(folder),
        peft_config=lora(task_type="SEQ_CLS"),
        train_dataset={name: make_text_data("bert", seed=i) for i, name in enumerate(tasks)},
        processing_class=transformers.AutoTokenizer.from_pretrained(source),
        **options,
    )
    trainer.train()
    return trainer


STOCK = """
    import sys
    sys.modules["eblora_hf"] = None
    import json, torch, transformers
    from peft import AutoPeftModelForSequenceClassification
    source = sys.argv[1]
    text = ["w3 w5 w7 w9", "w20 w21 w1"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(text, return_tensors="pt", padding=True)
    found = {}
    with torch.no_grad():
        for loader in (AutoPeftModelForSequenceClassification, transformers.AutoModelForSequenceClassification):
            model = loader.from_pretrained(source, num_labels=3).eval()
            found[loader.__name__] = torch.softmax(model(**inputs).logits, -1).tolist()
    pipe = transformers.pipeline("text-classification", model=source, top_k=None)
    found["pipeline"] = [[x["score"] for x in sorted(scores, key=lambda x: x["label"])] for scores in pipe(text)]
    print(json.dumps(found))
"""


def stock(source, folder):
    """What stock loaders answer in a process that cannot import this package."""
    result = run_script(STOCK, folder, str(source), HF_HUB_CACHE=str(folder / "cache"))
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: torch.tensor(value) for name, value in json.loads(result.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """
    The loaders that load a stock PEFT adapter with its head: before some version, transformers' own left it out.
    """
    folder = tmp_path_factory.mktemp("stock")
    make_model("bert").save_pretrained(folder / "base")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = get_peft_model(load(folder / "base"), lora(task_type="SEQ_CLS"))
    torch.nn.init.ones_(model.get_base_model().classifier.modules_to_save["default"].weight)
    model.save_pretrained(folder / "adapter")
    loaded = dict(load(folder / "adapter", num_labels=3).named_parameters())
    complete = any("classifier" in name and bool((weight == 1).all()) for name, weight in loaded.items())
    peft = {"AutoPeftModelForSequenceClassification"}
    return peft | {"AutoModelForSequenceClassification", "pipeline"} if complete else peft


def expected(source, sequence):
    model = load_sequence(transformers.AutoModelForSequenceClassification.from_pretrained(source), sequence)
    inputs = make_tokenizer()(["w3 w5 w7 w9", "w20 w21 w1"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return torch.softmax(model(**inputs).logits, -1)


def test_a_folder_on_a_local_base_model(base, tmp_path, loaders):
    train(tmp_path / "out", base)
    answers = stock(tmp_path / "out", tmp_path)
    assert len(answers) == 3
    for name in loaders:
        torch.testing.assert_close(answers[name], expected(base, tmp_path / "out"), atol=1e-5, rtol=1e-5, msg=name)
    assert "## Tasks" in (tmp_path / "out/README.md").read_text()


def test_a_repository_on_a_base_model_of_the_hub(server, base, tmp_path, monkeypatch, loaders):
    monkeypatch.setattr("eblora_hf.published.identity.HF_HUB_CACHE", os.environ["HF_HUB_CACHE"])
    HfApi().create_repo("org/base")
    HfApi().upload_folder(repo_id="org/base", folder_path=str(base))
    commit = server.repos["org/base"].branches["main"]
    train(tmp_path / "out", "org/base")
    index = PublishedSequence.open(tmp_path / "out").base_model
    assert (index["name_or_path"], index["revision"]) == ("org/base", commit)
    push_sequence(tmp_path / "out", "me/seq")
    config = json.loads(server.repos["me/seq"].resolve("main").files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    answers = stock("me/seq", tmp_path)
    for name in loaders:
        torch.testing.assert_close(answers[name], expected(base, tmp_path / "out"), atol=1e-5, rtol=1e-5, msg=name)


def test_what_is_pushed_names_no_folder_of_this_machine(server, base, tmp_path):
    train(tmp_path / "out", base, push_bases=False)
    local = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert local["base_model_name_or_path"] == str(base)
    push_sequence(PublishedSequence.open(tmp_path / "out"), "me/seq")
    files = server.repos["me/seq"].resolve("main").files
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    for name, data in files.items():
        assert str(tmp_path).encode() not in data, name
    assert not [name for name in files if name.startswith(".eblora")]
    fetched = fetch_sequence("me/seq", folder=tmp_path / "copy")
    assert json.loads((fetched.folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_a_folder_that_was_repaired_still_names_its_base(base, tmp_path):
    train(tmp_path / "out", base)
    before = (tmp_path / "out/adapter_config.json").read_bytes()
    (tmp_path / "out/adapter_config.json").write_bytes(b"{}")
    PublishedSequence.open(tmp_path / "out", repair=True)
    assert (tmp_path / "out/adapter_config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("org/base", "org/base"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("", ""),
        ("/abs/path", ""),
        ("../up", ""),
        ("./here", ""),
        ("a/b/c", ""),
        ("there", ""),  # a folder
    ],
)
def test_what_counts_as_a_model_of_the_hub(tmp_path, monkeypatch, name, origin):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    model = make_model("bert")
    model.config._name_or_path = name
    assert describe_base_model(model)["name_or_path"] == origin


def test_a_revision_in_the_lora_config_is_recorded():
    model = make_model("bert")
    model.config._name_or_path = "org/base"
    get_peft_model(model, lora(revision="v1.0"))
    assert describe_base_model(model)["revision"] == "v1.0"
