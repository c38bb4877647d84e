"""Scores of generated answers, one rule for each kind of data set of UCIT and MLLM-DCL, and those of captions.

The rules are those of the released evaluation of EBLoRA (arXiv 2602.00722); docs/benchmarks.md says which data set has
which. Answers come without blanks around them. A score lies between 0 and 1.
"""

import contextlib
import io
import shutil
from typing import Any

REFUSAL = "Unanswerable"  # an answer with this word counts as wrong, whatever else it says
CAPTION_SCORES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
_ONE_OF_A_KIND = ("AI2D", "TQA", "VQA", "SciVerse")  # how the names of the images of closed questions begin


def equal(answer: str, truth: str, record: dict[str, Any]) -> float:
    """The same text, whatever the case (ImageNet-R, ArxivQA, IconQA, CLEVR-Math)."""
    return float(answer.upper() == truth.upper())


def word(answer: str, truth: str, record: dict[str, Any]) -> float:
    """
    The truth within the answer (remote sensing, autonomous driving): of several words as they are; one word without
    its full stop, with a blank before it, or a blank, a comma or a full stop after it, in an answer of several words.
    """
    if REFUSAL in answer:
        return 0.0
    answer, truth = answer.lower(), truth.lower()
    if " " in truth:
        return float(truth in answer)
    truth = truth.replace(".", "")
    if " " not in answer:
        return float(truth in answer)
    return float(any(form in answer for form in (f" {truth}", f"{truth} ", f"{truth}.", f"{truth},")))


def within(answer: str, truth: str, record: dict[str, Any]) -> float:
    """The truth anywhere in the answer, whatever the case (medicine)."""
    return float(REFUSAL not in answer and truth.lower() in answer.lower())


def science(answer: str, truth: str, record: dict[str, Any]) -> float:
    """
    The same text for closed questions, by the name of the image (AI2D, TQA, VQA, SciVerse); of the others, which are
    on maps, the share of the states asked for that are named, or the truth anywhere in the answer.
    """
    if REFUSAL in answer:
        return 0.0
    answer, truth = answer.lower(), truth.lower()
    if record["image"].rsplit("/", 1)[-1].split("_")[0] in _ONE_OF_A_KIND:
        return float(answer == truth)
    if "Which states" in record["text"]:
        states, named = truth.split(","), answer.split(",")  # blanks count
        return sum(state in named for state in states) / len(states)
    return float(truth in answer)


def choice(answer: str, truth: str, record: dict[str, Any]) -> float:
    """The same text, without the blanks and full stops of the answer, whatever the case (finance)."""
    return float(REFUSAL not in answer and answer.lower().replace(" ", "").replace(".", "") == truth.lower())


SCORERS = {"equal": equal, "word": word, "within": within, "science": science, "choice": choice}


def check_captions() -> None:
    """
    Raises:
        ModuleNotFoundError: if what caption scores are computed with is not installed: pycocoevalcap, and Java.
    """
    try:
        import pycocoevalcap  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The scores of captions need pycocoevalcap: pip install "eblora-hf[captions]"; and Java.'
        ) from error
    if shutil.which("java") is None:
        raise ModuleNotFoundError(
            "The scores of captions need Java: METEOR and the tokenizer of pycocoevalcap are programs of it, and "
            "there is no `java` on the PATH."
        )


def caption_scores(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """
    BLEU-1 to BLEU-4, METEOR, ROUGE-L and CIDEr of captions as COCO computes them, and `mean`, that of the seven.

    Args:
        captions (`list[str]`): One of each picture.
        references (`list[list[str]]`): What people wrote of each.

    Returns:
        `dict[str, float]`: Of the whole set. All lie between 0 and 1 but CIDEr, which goes to 10.
    """
    check_captions()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = PTBTokenizer()
        said = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(captions)})
        true = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
        values = [*Bleu(4).compute_score(true, said)[0]]
        values += [scorer().compute_score(true, said)[0] for scorer in (Meteor, Rouge, Cider)]
    scores = {name: float(value) for name, value in zip(CAPTION_SCORES, values, strict=True)}
    return scores | {"mean": sum(scores.values()) / len(scores)}
