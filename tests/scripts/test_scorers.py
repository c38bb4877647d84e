"""The scores of answers, rule by rule, on cases worked by hand; those of captions against their formulas."""

import importlib
import math
import shutil
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
MAP = {"image": "Sci/MapQA_12.png", "text": "Which states have a value above 3?"}
COUNT = {"image": "Sci/MapQA_12.png", "text": "How many?"}
CLOSED = {"image": "Sci/AI2D_7.png", "text": "Which states have a value above 3?"}

# rule, answer, truth, record, score
CASES = [
    ("equal", "B", "b", {}, 1),
    ("equal", "stethoscope", "Stethoscope", {}, 1),
    ("equal", "B.", "B", {}, 0),
    ("equal", "B", "B ", {}, 0),  # the truth is taken as it is
    ("equal", "", "B", {}, 0),
    ("word", "the image shows a storage tank near water", "storage tank", {}, 1),
    ("word", "Storage Tank", "storage tank", {}, 1),  # several words: anywhere, whatever the case
    ("word", "tanks for storage", "storage tank", {}, 0),
    ("word", "yes", "Yes.", {}, 1),  # the full stop of the truth is left out
    ("word", "yesterday", "Yes", {}, 1),  # an answer of one word holds it anywhere
    ("word", "it is yes", "Yes", {}, 1),  # a blank before it
    ("word", "Yes it is", "Yes", {}, 1),  # a blank after it
    ("word", "oh:yes, surely", "yes", {}, 1),  # a comma
    ("word", "oh:yes. surely", "yes", {}, 1),  # a full stop
    ("word", "oh:yes; surely", "yes", {}, 0),
    ("word", "a yesterday thing", "yes", {}, 1),  # the blank before it is enough
    ("word", "Unanswerable, or yes", "yes", {}, 0),
    ("word", "unanswerable, or yes", "yes", {}, 1),  # the refusal has a capital letter
    ("within", "The lung is affected.", "lung", {}, 1),
    ("within", "Plunging", "LUNG", {}, 1),
    ("within", "the heart", "lung", {}, 0),
    ("within", "Unanswerable: lung", "lung", {}, 0),
    ("science", "photosynthesis", "Photosynthesis", CLOSED, 1),
    ("science", "it is photosynthesis", "photosynthesis", CLOSED, 0),  # closed: the same text, whatever is asked
    ("science", "texas,ohio", "Ohio,Texas,Utah,Iowa", MAP, 0.5),
    ("science", "Texas, Ohio", "Ohio,Texas", MAP, 0.5),  # " ohio" is not "ohio"
    ("science", "", "Ohio", MAP, 0),
    ("science", "there are 12 of them", "12", COUNT, 1),
    ("science", "Unanswerable 12", "12", COUNT, 0),
    ("choice", " A .", "A", {}, 1),
    ("choice", "y e s.", "Yes", {}, 1),
    ("choice", "A", "A.", {}, 0),  # the truth is taken as it is
    ("choice", "AB", "A", {}, 0),
    ("choice", "Unanswerable", "Unanswerable", {}, 0),
]


@pytest.fixture
def scorers(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("scorers")


@pytest.mark.parametrize("case", CASES, ids=[f"{rule}-{answer!r}-{truth!r}" for rule, answer, truth, *_ in CASES])
def test_a_rule_by_hand(case, scorers):
    rule, answer, truth, record, score = case
    assert scorers.SCORERS[rule](answer, truth, record) == score


def test_every_rule_has_a_case_that_is_right_and_one_that_is_wrong(scorers):
    for rule in scorers.SCORERS:
        assert {0, 1} <= {score for name, _, _, _, score in CASES if name == rule}


def test_captions_by_hand(scorers):
    """With one picture and one reference all but METEOR can be worked out; CIDEr needs two, for the idf."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("METEOR and the tokenizer are programs of Java")
    scores = scorers.caption_scores(["A dog runs on grass."], [["a dog runs on the grass"]])
    # all 5 words are in the reference; 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples; one word shorter: exp(1 - 6/5)
    short, precisions = math.exp(-1 / 5), (1, 3 / 4, 2 / 3, 1 / 2)
    for n in range(1, 5):
        expected = short * math.prod(precisions[:n]) ** (1 / n)
        assert scores[f"BLEU-{n}"] == pytest.approx(expected, rel=1e-6)
    recall, precision, beta = 5 / 6, 1.0, 1.2  # the longest common subsequence has 5 words
    assert scores["ROUGE-L"] == pytest.approx((1 + beta**2) * recall * precision / (recall + beta**2 * precision))
    assert 0 < scores["METEOR"] < 1
    assert scores["mean"] == pytest.approx(sum(scores[name] for name in scorers.CAPTION_SCORES) / 7)
    same = scorers.caption_scores(["a red cat", "two blue birds"], [["a red cat"], ["two blue birds"]])
    # without tetragrams CIDEr's mean over n = 1 … 4 has three ones; times ten
    assert same["CIDEr"] == pytest.approx(7.5)
    assert same["METEOR"] == pytest.approx(1.0)
    assert (same["BLEU-1"], same["ROUGE-L"]) == pytest.approx((1.0, 1.0))


def test_captions_without_what_they_need_are_refused(scorers, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ModuleNotFoundError, match="need Java"):
        scorers.check_captions()
