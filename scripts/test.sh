#!/usr/bin/env bash
# Sets up .venv, checks style and types and runs the tests on the installed package, with the arguments given to pytest.
# `test.sh --lowest …` does it in .venv-lowest, with the lower bounds of pyproject.toml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv
if [ "${1:-}" = --lowest ]; then
    shift
    venv=.venv-lowest
    bash scripts/environment.sh "$venv" test --lowest
else
    bash scripts/environment.sh "$venv" test
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
fi
# one process per core, a file of tests at a time, in the order of their names: the longest do not come last
exec "$venv/bin/pytest" --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
