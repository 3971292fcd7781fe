#!/usr/bin/env bash
# Makes the environment and passes the tests: lint, format, types, then pytest with the arguments given.
#   scripts/test.sh -m 'not server'     leaves out the tests that start a real server
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/scripts/env.sh" | tail -n 1)
export PATH="$(dirname "$python"):$PATH"
export PYTHONPATH="$root/python${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
