"""Fixtures, and the writing of docs/support.md."""

import json

import pytest

from .support import tables


@pytest.fixture
def silent(capfd):
    """For tests whose output is of no interest."""
    yield
    capfd.readouterr()


# ---- docs/support.md ----

_support_cells: list[tuple[str, str, str, str]] = []


def pytest_addoption(parser):
    parser.addoption("--write-support", action="store_true", help="write docs/support.md from the tests that passed")


def pytest_configure(config):
    if config.getoption("--write-support") and not hasattr(config, "workerinput"):
        tables.PATH.unlink(missing_ok=True)  # nothing to compare with


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        _support_cells.extend(tuple(json.loads(value)) for name, value in report.user_properties if name == "support")


def pytest_sessionfinish(session):
    if session.config.getoption("--write-support") and not hasattr(session.config, "workerinput"):
        tables.PATH.parent.mkdir(exist_ok=True)
        tables.PATH.write_text(tables.render(_support_cells))
