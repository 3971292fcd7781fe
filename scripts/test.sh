#!/usr/bin/env bash
# Makes the environment and passes the tests: lint, format, types, import contracts, then pytest with the arguments given.
#   scripts/test.sh -m 'not server'     leaves out the tests that start a real server
#   scripts/test.sh test/core           one room's
#   SGLANG_SLO_SGLANG=0.5.17            with another SGLang that is supported (env.sh), tests only
#   SGLANG_SLO_TEST_JOBS=0              how many processes share the tests (default: 2; 0: pytest alone)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/scripts/env.sh" | tail -n 1)
export PATH="$(dirname "$python"):$PATH"
export PYTHONPATH="$root/python${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more would wait for each other where tests share the cores
cd "$root"
if [[ -z ${SGLANG_SLO_SGLANG:-} ]]; then # the same whichever SGLang there is
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    lint-imports --no-cache
fi
exec "$python" -m pytest -n "${SGLANG_SLO_TEST_JOBS:-2}" --no-loadscope-reorder "$@"
