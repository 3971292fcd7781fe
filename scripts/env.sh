#!/usr/bin/env bash
# Makes the environment of requirements.lock, once, and prints the path of its python as the last line.
#
# The environment lies in a cache folder under a name made from the lock file and the Python version, so every checkout
# with the same lock uses the same one. It holds dependencies only: put the checkout's python/ folder on PYTHONPATH
# (serve.sh and test.sh do). An environment counts only once its `.complete` file is there, which is written last:
# what a killed install leaves behind is removed and built again. Two builds at once wait for each other. Environments
# that nobody asked for in a month, of locks that have changed since, are removed, but none that a process still uses.
#
#   scripts/env.sh                    makes the environment, prints its python
#   scripts/env.sh --sglang VERSION   the same for another SGLang that is supported (requirements-VERSION.lock)
#   scripts/env.sh --remove           removes every environment and what this script left in the checkout
#
#   SGLANG_SLO_SGLANG    what --sglang says, for the scripts that call this one
#   SGLANG_SLO_ENV_DIR   folder for environments   (default: sglang-slo in the user's cache folder)
#   SGLANG_SLO_PYTHON    python to build with      (default: the first of 3.12, 3.11, 3.13, 3.10, python3 that works)
#   SGLANG_SLO_LOCK      lock file                 (default: requirements.lock of this checkout)
#   SGLANG_SLO_ENV_DAYS  days after which an environment that nobody asked for goes (default: 30; 0: never)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { echo "[env] $*" >&2; }
die() { say "$*"; exit 1; }

lock_of() { # lock_of VERSION: the lock file of this checkout that pins that SGLang; none given: requirements.lock
    local file
    for file in "$root/requirements.lock" "$root/requirements-$1.lock"; do
        [[ -f $file ]] || continue
        if [[ -z $1 ]] || grep -qxF "sglang==$1" "$file"; then echo "$file" && return; fi
    done
    die "no lock file for SGLang $1; there are: $(cd "$root" && grep -hx 'sglang==.*' requirements*.lock | tr '\n' ' ')"
}

usable() { # can this python make an environment?
    "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, ${least#3.}))" >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n ${SGLANG_SLO_PYTHON:-} ]]; then
        usable "$SGLANG_SLO_PYTHON" || die "SGLANG_SLO_PYTHON: need Python >= $least with venv, got $SGLANG_SLO_PYTHON"
        echo "$SGLANG_SLO_PYTHON" && return
    fi
    for candidate in python3.12 python3.11 python3.13 python3.10 python3; do
        usable "$candidate" && echo "$candidate" && return
    done
    die "need Python >= $least with venv on PATH (or its path in SGLANG_SLO_PYTHON)"
}

build() { # build ENV_DIR PYTHON; the caller holds the lock
    local env=$1 python=$2
    [[ -e $env ]] && say "removing an unfinished environment: $env"
    rm -rf "$env"
    say "building $env with $("$python" --version) (once for this lock file; about 10 GB, some minutes)"
    # Built where it will stay: an environment's own scripts hold its absolute path.
    "$python" -m venv "$env"
    # pip is loud about package indexes that lack a package; that is no news.
    "$env/bin/python" -m pip install --disable-pip-version-check -r "$lock" \
        1>&2 2> >(grep -v --line-buffered 'is ignored: it is neither a file nor a directory' >&2 || true)
    : >"$env/.complete"
}

entry_points() { # SGLang finds our plugins by package metadata, which must lie beside the package
    local stamp=$root/python/sglang_slo.egg-info/entry_points.txt
    [[ $stamp -nt $root/pyproject.toml ]] && return
    (cd "$root" && "$1" -W ignore -c 'import setuptools; setuptools.setup()' -q egg_info 1>&2)
    touch "$stamp"
}

in_use() { # does any process run from this environment, or with its libraries?
    # The name goes in by standard input: grep's own command line is among those that are read.
    grep -sqaFf - /proc/[0-9]*/cmdline /proc/[0-9]*/maps <<<"$1/"
}

remove() { # remove ENV_DIR WHY; keeps what is in use
    in_use "$1" && { say "kept, as a process uses it: $1"; return 1; }
    say "removing $1 ($2)"
    rm -rf "$1" "$1.lock"
}

prune() { # prune ENV_DIR: every other environment that was not asked for lately
    local days=${SGLANG_SLO_ENV_DAYS:-30} other
    [[ $days =~ ^[0-9]+$ ]] || die "SGLANG_SLO_ENV_DAYS: need a whole number of days, got $days"
    ((days > 0)) || return 0
    for other in "$envs"/env-*/; do
        other=${other%/}
        [[ $other != "$1" && -e $other/.complete ]] || continue
        [[ -n $(find "$other/.complete" -mtime "+$((days - 1))") ]] || continue
        remove "$other" "asked for last more than $days days ago" || true
    done
}

remove_all() {
    local env kept=0
    for env in "$envs"/env-*/; do
        [[ -d $env ]] && { remove "${env%/}" "as asked" || kept=1; }
    done
    [[ -n ${SGLANG_SLO_LOCK:-} ]] || rm -rf "$root/python/sglang_slo.egg-info"
    rmdir "$envs" 2>/dev/null || true
    [[ ! -d $envs ]] || say "left there: $envs (demo model, latency profiles, length models; delete it if you will)"
    return "$kept"
}

envs=${SGLANG_SLO_ENV_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/sglang-slo}
case ${1:-} in
    "") ;;
    --remove) remove_all; exit ;;
    --sglang) SGLANG_SLO_SGLANG=${2:?"--sglang needs a version"} ;;
    *) die "unknown argument $1; accepted: --sglang VERSION, --remove, or none" ;;
esac
lock=${SGLANG_SLO_LOCK:-$(lock_of "${SGLANG_SLO_SGLANG:-}")}
[[ -f $lock ]] || die "no lock file: $lock"
# a lock file's first line may say which Python its packages need
least=$(sed -n '1s/^# python >= //p' "$lock")
least=${least:-3.10}
python=$(find_python)
version=$("$python" -c 'import platform; print("-".join([*platform.python_version_tuple()[:2], platform.machine()]))')
env=$envs/env-$( (cat "$lock"; echo "$version") | sha256sum | cut -c1-16)
mkdir -p "$envs"
if [[ ! -e $env/.complete ]]; then
    exec 9>"$env.lock"
    flock -n 9 || { say "waiting for another build of $env"; flock 9; }
    [[ -e $env/.complete ]] || build "$env" "$python"
    exec 9>&-
fi
touch -c "$env/.complete" # its time is when it was last asked for
prune "$env"
[[ -n ${SGLANG_SLO_LOCK:-} ]] || entry_points "$env/bin/python"
echo "$env/bin/python"
