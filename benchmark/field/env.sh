#!/usr/bin/env bash
# Makes the environment of one tool of the field, once, and prints the path of its python as the last line.
#
# Each tool has an environment of its own, beside the main one (scripts/env.sh) and apart from its lock: their needs
# contradict each other's. It lies in the cache folder under the tool's name and a name made from what is installed,
# and counts only once its `.complete` file is there; what a killed install leaves behind is removed and built again.
#
#   benchmark/field/env.sh            lists the tools
#   benchmark/field/env.sh guidellm   makes that tool's environment, prints its python
#   benchmark/field/env.sh --remove   removes them all
set -euo pipefail
envs=${SGLANG_SLO_ENV_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/sglang-slo}
declare -A least=([inference-perf]=12) # of Python 3; 11 where nothing is said
declare -A needs=(
    [router]="sglang-router==0.3.2"
    [litellm]="litellm[proxy]==1.105.2"
    [guidellm]="guidellm==0.8.1"
    [inference-perf]="inference-perf==0.7.0"
    [aiperf]="aiperf==0.13.0"
    [trace]="opentelemetry-sdk==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-exporter-otlp-proto-grpc==1.45.2"
    [browser]="playwright==1.65.2" # drives the Chromium of the machine
    [kubernetes]="kubernetes-validate==1.37.0"
    [ray]="ray[serve]==2.60.0"
    [docs]="mkdocs-material==9.8.2 mkdocs==1.6.1"
)

say() { echo "[field] $*" >&2; }
die() { say "$*"; exit 1; }

find_python() { # find_python LEAST: the first that is at least 3.LEAST and can make an environment
    local candidate
    for candidate in "${SGLANG_SLO_PYTHON:-python3.12}" python3.12 python3.11 python3.13 "$HOME"/.pyenv/versions/3.1[23]*/bin/python; do
        "$candidate" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $1))" >/dev/null 2>&1 \
            && echo "$candidate" && return
    done
    die "need Python 3.$1 to 3.13 with venv on PATH (or its path in SGLANG_SLO_PYTHON)"
}

case ${1:-} in
    "") printf '%s\n' "${!needs[@]}" | sort; exit ;;
    --remove) rm -rf "$envs"/field-*; exit ;;
esac
need=${needs[$1]:-}
[[ -n $need ]] || die "unknown tool $1; known: ${!needs[*]}"
python=$(find_python "${least[$1]:-11}")
env=$envs/field-$1-$(echo "$need $("$python" --version)" | sha256sum | cut -c1-12)
mkdir -p "$envs"
exec 9>"$env.lock"
flock 9
if [[ ! -e $env/.complete ]]; then
    say "building $env: $need"
    rm -rf "$env"
    "$python" -m venv "$env"
    # shellcheck disable=SC2086  # several requirements stand in one line
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check $need >&2
    : >"$env/.complete"
fi
echo "$env/bin/python"
