#!/usr/bin/env bash
# Starts the server, making its environment first. Every SGLang flag and every --slo-* flag may follow;
# without --model-path it serves the embedded demo model. See env.sh for where the environment lies.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/scripts/env.sh" | tail -n 1)
export PATH="$(dirname "$python"):$PATH" # for the build tools that FlashInfer calls
export PYTHONPATH="$root/python${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m sglang_slo.launch_server "$@"
