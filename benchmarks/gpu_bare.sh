#!/usr/bin/env bash
# The GPU suite on a machine without a network, whose Python has torch and triton, from a checkout that is not installed.
#
#     bash benchmarks/gpu_bare.sh pack FOLDER PYTHON          here: wheels for that Python (as 3.12), and the extension
#     bash benchmarks/gpu_bare.sh run FOLDER OUT [OPTIONS]    there, in the checkout; options of benchmarks.gpu
#
# WANTED names the packages that its image lacks, ATTNREUSE_CUDA_ARCHS the architectures to build for (90a).
set -euo pipefail
test -f pyproject.toml || { echo "run it in the project's root" >&2; exit 1; }
export ATTNREUSE_CUDA=1 ATTNREUSE_CUDA_ARCHS=${ATTNREUSE_CUDA_ARCHS:-90a}

build() {  # PYTHON LIB: the extension, out of the tree
    local work; work=$(mktemp -d)
    "$1" setup.py -q build_ext --build-lib "$2" --build-temp "$work" > "$work/log" 2>&1 || { tail -20 "$work/log" >&2; return 1; }
}

pack() {  # FOLDER PYTHON
    mkdir -p "$1/wheels"
    git describe --always --dirty > "$1/commit"
    local wanted=${WANTED:-diffusers pydantic pydantic-core annotated-types typing-inspection typing-extensions importlib-metadata lazy-importer}
    local platforms=(); for p in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${p}_x86_64"); done
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$2" --implementation cp "${platforms[@]}" \
        -c constraints.txt -d "$1/wheels" $wanted
    local python; python=$(command -v "python$2" || true)
    if [ -n "$python" ] && command -v nvcc > /dev/null; then
        local work; work=$(mktemp -d)
        "$python" -m venv "$work" && "$work/bin/pip" install -q setuptools pybind11 ninja
        build "$work/bin/python" "$(cd "$1" && pwd)/prebuilt"
    else
        echo "python$2 or nvcc is not here: the extension is built there" >&2
    fi
    ls "$1"/*
}

run() {  # FOLDER OUT OPTIONS
    local tree out began=$SECONDS; tree=$(mktemp -d) out=$2
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$tree/site" "$1"/wheels/*.whl
    cp -r attnreuse benchmarks tests pyproject.toml "$tree/"
    rm -rf "$tree/attnreuse/kernels" && cp -r kernels/triton "$tree/attnreuse/kernels"
    cp "$1"/prebuilt/attnreuse/_native*.so "$tree/attnreuse/" 2> /dev/null || { build python3 "$tree/lib" && cp "$tree"/lib/attnreuse/_native*.so "$tree/attnreuse/"; } \
        || echo "the extension was not built: its kernels are left out" >&2
    export PYTHONPATH="$tree:$tree/site:$tree/benchmarks" PYTHONUNBUFFERED=1 ATTNREUSE_COMMIT; ATTNREUSE_COMMIT=$(cat "$1/commit")
    shift 2
    cd "$tree" && python3 -W ignore benchmarks/gpu.py --out "$out" --seconds $((565 - SECONDS + began)) "$@"
}

case ${1:-} in
    pack) pack "$2" "${3:-3.12}" ;;
    run) run "${@:2}" ;;
    *) sed -n 2,8p "$0"; exit 2 ;;
esac
