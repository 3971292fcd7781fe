#!/usr/bin/env bash
# Runs one of this package's commands, or any module, in its environment, which it makes first.
#   scripts/run.sh                          lists the commands
#   scripts/run.sh twin compare --help      a command of `sglang-slo`
#   scripts/run.sh -m pytest test/core      anything that python takes
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/scripts/env.sh" | tail -n 1)
export PATH="$(dirname "$python"):$PATH" # for the build tools that FlashInfer calls
export PYTHONPATH="$root/python${PYTHONPATH:+:$PYTHONPATH}"
case ${1:-} in
    -*) [[ $1 == -h || $1 == --help ]] || exec "$python" "$@" ;;
esac
exec "$python" -m sglang_slo "$@"
