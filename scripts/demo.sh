#!/usr/bin/env bash
# Sets up .venv and runs `eblora demo` with the arguments given.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
bash "$here/environment.sh" .venv demo
exec "$here/../.venv/bin/eblora" demo "$@"
