#!/usr/bin/env bash
# Starts the server, making its environment first. Every SGLang flag and every --slo-* flag may follow;
# without --model-path it serves the embedded demo model. See env.sh for where the environment lies.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" serve "$@"
