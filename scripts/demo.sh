#!/usr/bin/env bash
# Sets up .venv and runs `eblora demo` with the arguments given.
set -euo pipefail
bash "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/eblora" demo "$@"
