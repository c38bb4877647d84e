#!/usr/bin/env bash
# Sets up .venv, checks the style and runs the tests on the installed package, with the arguments given to pytest.
set -euo pipefail
bash "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# one process per core, a file of tests at a time, in the order of their names: the longest do not come last
exec .venv/bin/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
