#!/usr/bin/env bash
# Builds a worker for other machines: one program that starts wherever glibc is 2.28 (2018) or newer, and with --cuda uses NVIDIA's GPUs
# where there are some. Needs Rust and Python 3 with pip; linker and CUDA compiler come as Python packages, nothing is installed.
#
#     worker/build.sh [--cuda] [--output FILE]      by default target/release/outliers-worker-portable
#
# FILE.json says what the worker is, for controllers on machines that cannot run it.
set -euo pipefail
cd "$(dirname "$0")/.."

glibc=2.28
target=x86_64-unknown-linux-gnu
output='' features=()
while [ $# -gt 0 ]; do
    case $1 in
        --cuda) features=(--features cuda) ;;
        --output) output=${2:?--output needs a file}; shift ;;
        *) echo "usage: worker/build.sh [--cuda] [--output FILE]" >&2; exit 2 ;;
    esac
    shift
done
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "the toolkit is for Linux on x86_64; on $(uname -sm) take the worker of a release, or build in a container:" \
        "docs/devices.md" >&2
    exit 1
fi

build=${CARGO_TARGET_DIR:-target}
output=${output:-$build/release/outliers-worker-portable}
toolkit=$build/toolkit/$(sha256sum worker/toolkit.txt | cut -c 1-16)
if [ ! -e "$toolkit" ]; then
    echo "fetching linker and CUDA compiler (260 MB)"
    fresh=$build/toolkit/fresh.$$
    rm -rf "$fresh"
    mkdir -p "$fresh/wheels"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        --requirement worker/toolkit.txt --dest "$fresh/wheels"
    for wheel in "$fresh"/wheels/*.whl; do
        # Both older assemblers have the same name.
        case $wheel in
            */nvidia_cuda_nvcc_cu11-*) into=$fresh/ptxas-cu11 ;;
            */nvidia_cuda_nvcc_cu12-*) into=$fresh/ptxas-cu12 ;;
            *) into=$fresh ;;
        esac
        python3 -m zipfile -e "$wheel" "$into"
    done
    rm -r "$fresh/wheels"
    # The archives forget who may run.
    chmod +x "$fresh/ziglang/zig" "$fresh"/cargo_zigbuild-*.data/scripts/* "$fresh"/nvidia/cu13/bin/* "$fresh"/nvidia/cu13/nvvm/bin/* \
        "$fresh"/ptxas-cu1[12]/nvidia/cuda_nvcc/bin/ptxas
    mv "$fresh" "$toolkit" 2>/dev/null || { [ -e "$toolkit" ] && rm -rf "$fresh"; }
fi
toolkit=$(cd "$toolkit" && pwd)

rustup target add "$target" 2>/dev/null || true
export CARGO_ZIGBUILD_ZIG_PATH=$toolkit/ziglang/zig
export CUDA_HOME=$toolkit/nvidia/cu13 REAL_NVCC=$toolkit/nvidia/cu13/bin/nvcc NVCC=$PWD/worker/cuda/nvcc.sh
# The first GPUs with bf16, and all that came after: see nvcc.sh. No GPU is asked, none need be there.
export CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=12040
"$toolkit"/cargo_zigbuild-*.data/scripts/cargo-zigbuild zigbuild --release --locked --package outliers-worker \
    ${features[@]+"${features[@]}"} --target "$target.$glibc"

mkdir -p "$(dirname "$output")"
# What runs from the old one goes on with it.
cp "$build/$target/release/outliers-worker" "$output.part"
if [ ${#features[@]} -gt 0 ]; then
    # So that no GPU's driver has to compile them.
    find "$build/$target"/release/build/candle-kernels-*/out worker/cuda -name '*.ptx' \
        -exec python3 worker/cuda/assemble.py "$output.part" "$toolkit" {} +
fi
mv -f "$output.part" "$output"
"$output" version
# What it is, for controllers on machines that cannot run it.
"$output" version --json > "$output.json.part"
mv -f "$output.json.part" "$output.json"
echo "$output: $(($(wc -c < "$output") / 1000000)) MB, $(($(gzip -c "$output" | wc -c) / 1000000)) MB compressed"
