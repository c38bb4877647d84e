#!/usr/bin/env bash
# Creates or updates .venv with this package and what its demo and tests need. PYTHON and TORCH choose other versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet "${TORCH:-torch==2.13.0}"
.venv/bin/python -m pip install --quiet '.[test]'
rm -rf build ./*.egg-info
