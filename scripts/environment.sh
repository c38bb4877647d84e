#!/usr/bin/env bash
# environment.sh FOLDER EXTRA [--lowest]: creates or updates a virtual environment with this package and an extra of
# pyproject.toml; with --lowest at exactly the lower bounds that stand there. PYTHON and TORCH choose other versions.
set -euo pipefail
export PIP_DISABLE_PIP_VERSION_CHECK=1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1 extra=$2 torch=${TORCH:-torch==2.13.0}
constraints=/dev/null
"${PYTHON:-python3}" -m venv "$folder"
if [ "${3:-}" = --lowest ]; then
    constraints=$folder/lowest.txt
    grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' >"$constraints"
    torch=$(grep '^torch==' "$constraints")
fi
"$folder/bin/python" -m pip install -c "$constraints" "$torch"
"$folder/bin/python" -m pip install -c "$constraints" ".[$extra]"
rm -rf build ./*.egg-info
