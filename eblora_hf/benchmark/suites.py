"""The suites of the benchmark by name."""

from .digits import DigitsSuite
from .docstrings import SHORT_TASKS, TASKS, TextSuite
from .suite import Suite
from .transformations import PROTOCOL_TASKS, TRANSFORMATIONS

_EIGHTEEN = [name for name in TRANSFORMATIONS if name not in ("upright", "permute")]

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        DigitsSuite("digits", PROTOCOL_TASKS, "shared", "six transformations of digits"),
        DigitsSuite("long", _EIGHTEEN, "shared", "eighteen transformations of digits, at the settings for six"),
        TextSuite("text", list(TASKS), "per-task", "four groups of six modules, each with a head of its own"),
        TextSuite("text-grow", list(TASKS), "grow", "the same under one head over all labels so far"),
        TextSuite("text-long", list(SHORT_TASKS), "per-task", "ten groups of three modules"),
    )
}
