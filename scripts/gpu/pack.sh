#!/usr/bin/env bash
# Makes the offline bundle for a GPU host that has no package registry: OUT/sglang-slo-gpu.tar.xz, with run.sh beside it.
#
#   scripts/gpu/pack.sh OUT [--data DIR]
#
# For: x86-64, Linux, Python 3.12, torch 2.11.0+cu130, triton, numpy, nvcc of CUDA 13, ninja (`run.sh check` lists
# everything expected there). Holds: the distributions of bundle.txt at the versions of requirements-0.5.17.lock, this
# project as an installed distribution (so SGLang finds its entry points), the scripts, and with --data the traces that the
# ready-made workloads name. Needs a package registry here, a minute or two, and 3 GB of disk while it works.
# The same checkout and the same files from the registry give the same bytes. Fails if the bundle passes 60 MB.
#
#   SGLANG_SLO_PYTHON    python whose pip fetches the files   (default: python3; any version)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
limit_bytes=60000000
lock=$root/requirements-0.5.17.lock # its torch is the GPU hosts'
python=${SGLANG_SLO_PYTHON:-python3}

die() { echo "pack.sh: $*" >&2; exit 1; }
usage="usage: pack.sh OUT [--data DIR]"
out='' data=''
while (($#)); do
    case $1 in
        -h | --help) echo "$usage"; exit ;;
        --data) data=${2:?$usage}; shift ;;
        -*) die "unknown option $1; $usage" ;;
        *) [[ -z $out ]] || die "one OUT, got also $1; $usage"; out=$1 ;;
    esac
    shift
done
[[ -n $out ]] || die "$usage"
[[ -z $data || -d $data ]] || die "--data: no folder $data"
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/sglang-slo-pack.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/sglang-slo-gpu site=$work/sglang-slo-gpu/site
mkdir -p "$site"

quiet() { grep -v --line-buffered -e 'is ignored: it is neither a file' -e "as the 'root' user" >&2 || true; }

pins() { # NAME==VERSION for each name of bundle.txt, from the lock file
    awk 'function norm(s) { s = tolower(s); gsub(/[-_.]+/, "-", s); return s }
         { sub(/#.*/, ""); gsub(/[ \t\r]/, "") }
         FNR == NR { split($0, part, "=="); if (part[2] != "") pin[norm(part[1])] = $0; next }
         $0 != "" { if (!(norm($0) in pin)) { print "not in the lock file: " $0 > "/dev/stderr"; exit 1 } print pin[norm($0)] }' \
        "$lock" "$here/bundle.txt"
}

fetch() { # the bundled distributions, as they are for the host and not for this machine
    local platforms=() glibc
    for ((glibc = 39; glibc >= 5; glibc--)); do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    for glibc in 2014 2010 1; do platforms+=(--platform "manylinux${glibc}_x86_64"); done
    pins >"$work/pins.txt"
    "$python" -m pip install -q --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" --target "$site" -r "$work/pins.txt" \
        2> >(quiet)
}

install_project() { # from a copy: building in place would leave its traces in the checkout
    local copy=$work/project
    mkdir -p "$copy"
    (cd "$root" && tar --exclude=__pycache__ --exclude='*.egg-info' -cf - python pyproject.toml) | tar -C "$copy" -xf -
    if [[ -f $root/README.md ]]; then cp "$root/README.md" "$copy/"; else : >"$copy/README.md"; fi
    "$python" -m pip install -q --disable-pip-version-check --no-deps --no-compile --target "$site" "$copy" \
        2> >(quiet)
    rm -f "$site"/sglang_slo-*.dist-info/direct_url.json # names a folder of this machine
    grep -q 'sglang.srt.plugins' "$site"/sglang_slo-*.dist-info/entry_points.txt || die "entry points are missing"
}

slim() { # leave out what a Hopper GPU with the FlashInfer backend never loads
    local kernels=$site/sgl_kernel
    rm -rf "$kernels/sm100" "$kernels"/{flash_ops,flashmla_ops,infllm_ops}*.so # Blackwell, FlashAttention 3, MLA, InfLLM: 1.2 GB
    rm -rf "$site/sglang/multimodal_gen" "$site"/xgrammar/{lib,include} "$site"/{bin,share}
    find "$site" -name __pycache__ -prune -exec rm -rf {} +
    find "$site" -name '*.so*' -type f -exec strip --strip-unneeded {} + 2>/dev/null || true
}

add_project_files() {
    mkdir -p "$tree/scripts/gpu" "$tree/benchmark" "$tree/data"
    cp -r "$here"/*.sh "$here"/bundle.txt "$here/gpurun" "$tree/scripts/gpu/"
    find "$tree/scripts" -name __pycache__ -prune -exec rm -rf {} +
    [[ -d $root/benchmark ]] && find "$root/benchmark" -maxdepth 1 -name '*.py' -exec cp -t "$tree/benchmark" {} +
    if [[ -n $data ]]; then find "$data" -maxdepth 1 -name '*.csv' -exec cp -t "$tree/data" {} +; fi
    (cd "$site" && LC_ALL=C ls -d ./*.dist-info | sed 's,^\./,,; s,\.dist-info$,,; s,-\([^-]*\)$, \1,') >"$tree/versions.txt"
    chmod -R u=rwX,go=rX "$tree"
}

compress() { # fixed order, owner and times: equal content gives equal bytes, and unpacked sources never look newer
    #          than kernels that were compiled from an earlier copy of them
    tar -C "$work" --sort=name --mtime='2020-01-01 00:00Z' --owner=0 --group=0 --numeric-owner --format=gnu \
        -cf - sglang-slo-gpu | xz -T2 --block-size=64MiB -6 >"$out/sglang-slo-gpu.tar.xz.partial"
    mv "$out/sglang-slo-gpu.tar.xz.partial" "$out/sglang-slo-gpu.tar.xz"
    cp "$here/run.sh" "$out/run.sh"
}

fetch
rm -rf "$site/bin" # launchers that name this machine's python
install_project
slim
add_project_files
compress
size=$(stat -c %s "$out/sglang-slo-gpu.tar.xz")
echo "$out/sglang-slo-gpu.tar.xz: $size bytes, $(wc -l <"$tree/versions.txt") distributions"
((size <= limit_bytes)) || die "the bundle has $size bytes; at most $limit_bytes are allowed"
