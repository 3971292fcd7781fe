#!/usr/bin/env bash
# Runs the GPU measurements from the offline bundle (see pack.sh) or from a checkout; benchmark/GPU.md says what they are.
#
#   run.sh [--bundle FILE] [--out DIR] [--kernels DIR] [--device cuda|cpu] [more options] PART...
#   run.sh --out out check          which imports are missing, if any
#   run.sh --out out start          first start: compiles FlashInfer's kernels, keeps them in out/carry
#   run.sh --out out all            everything, in parts of under nine minutes each
#   run.sh --device cpu --out out all    the same script on a CPU, with the demo model and a handful of requests
#
# --bundle   default: sglang-slo-gpu.tar.xz beside this script; without one, the checkout this script lies in is used,
#            and python must find SGLang
# --out      results as JSON, logs, and `carry/`: results.tar.xz and the compiled kernels, to take home (default: ./out)
# --kernels  folder with kernels.tar.xz.* of an earlier visit (default: OUT/carry)
# Everything else goes to `python -m gpurun` (--help lists it).
#
#   SGLANG_SLO_GPU_WORK    folder for what is unpacked, compiled and cached (default: /tmp/sglang-slo-gpu). The build
#                          files of kernels hold absolute paths: kernels carried back in are used only at the same path
#   SGLANG_SLO_PYTHON      python to run with (default: python3)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${SGLANG_SLO_GPU_WORK:-/tmp/sglang-slo-gpu}
python=${SGLANG_SLO_PYTHON:-python3}
piece_bytes=15000000 # kernels travel in pieces of at most this
bundle='' out=out kernels='' rest=()

die() { echo "run.sh: $*" >&2; exit 2; }
while (($#)); do
    case $1 in
        --bundle) bundle=${2:?--bundle FILE}; shift ;;
        --out) out=${2:?--out DIR}; shift ;;
        --kernels) kernels=${2:?--kernels DIR}; shift ;;
        *) rest+=("$1") ;;
    esac
    shift
done
mkdir -p "$out/carry" "$work"
out=$(cd "$out" && pwd)
[[ -n $bundle || ! -f $here/sglang-slo-gpu.tar.xz ]] || bundle=$here/sglang-slo-gpu.tar.xz
[[ -z $bundle || -f $bundle ]] || die "--bundle: no file $bundle"

unpack() { # once for each bundle, whole or not at all
    local stamp
    stamp=$(sha256sum "$bundle" | cut -c1-32)
    [[ $(cat "$work/bundle.sha256" 2>/dev/null) != "$stamp" ]] || return 0
    rm -rf "$work/sglang-slo-gpu" "$work/bundle.sha256"
    tar -C "$work" -xJf "$bundle"
    echo "$stamp" >"$work/bundle.sha256"
}

restore_kernels() {
    local from=${kernels:-$out/carry}
    [[ ! -d $work/kernels ]] || return 0
    mkdir -p "$work/kernels"
    if compgen -G "$from/kernels.tar.xz.*" >/dev/null; then
        cat "$from"/kernels.tar.xz.* | tar -C "$work" -xJf - # with their times, which decide what is compiled again
    elif [[ -n $kernels ]]; then
        die "--kernels: no kernels.tar.xz.* in $kernels"
    fi
}

carry() { # what is worth taking home, in a few files
    set +e
    local first=$out/carry/kernels.tar.xz.00 newer=()
    [[ ! -f $first ]] || newer=(-newer "$first") # packed already, unless something was compiled since
    if [[ -n $(find "$work/kernels" -name '*.so' "${newer[@]}" -print -quit 2>/dev/null) ]]; then
        rm -f "$out"/carry/kernels.tar.xz.*
        tar -C "$work" -cf - kernels | xz -T0 -3 | split -b $piece_bytes -d - "$out/carry/kernels.tar.xz."
    fi
    tar -C "$out" --exclude=./carry -cf - . | xz -T0 -3 >"$out/carry/results.tar.xz"
}

if [[ -n $bundle ]]; then
    unpack
    tree=$work/sglang-slo-gpu path=$work/sglang-slo-gpu/site
else
    tree=$(cd "$here/../.." && pwd) path=$(cd "$here/../.." && pwd)/python
fi
restore_kernels
export PYTHONPATH="$tree/scripts/gpu:$tree/benchmark:$path${PYTHONPATH:+:$PYTHONPATH}"
export FLASHINFER_WORKSPACE_BASE=$work/kernels TVM_FFI_CACHE_DIR=$work/kernels/tvm-ffi
export TRITON_CACHE_DIR=$work/kernels/triton TORCHINDUCTOR_CACHE_DIR=$work/kernels/inductor
export MAX_JOBS=${MAX_JOBS:-$(nproc)} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE # the bundle holds sources only: compile them once, not in every process
trap carry EXIT
"$python" -m gpurun --out "$out" --work "$work" "${rest[@]}"
