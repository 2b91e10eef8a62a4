#!/usr/bin/env bash
# Builds a worker for other machines: one program that runs with glibc 2.28 (2018) or newer, and
# with --cuda uses NVIDIA's GPUs if there are any. Needs Rust and Python 3 with pip. Linker and
# CUDA compiler are Python packages. Nothing is installed.
#
#     worker/build.sh [--cuda] [--output FILE]      default: target/release/outliers-worker-portable
#
# FILE.json describes the worker, for controllers on machines that cannot run it.
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

build=${CARGO_TARGET_DIR:-target}
output=${output:-$build/release/outliers-worker-portable}
toolkit=$(worker/toolkit.sh)

rustup target add "$target" 2>/dev/null || true
export CARGO_ZIGBUILD_ZIG_PATH=$toolkit/ziglang/zig
export CUDA_HOME=$toolkit/nvidia/cu13 REAL_NVCC=$toolkit/nvidia/cu13/bin/nvcc NVCC=$PWD/worker/cuda/nvcc.sh
# Compute capability of the first GPUs with bf16; newer ones run the same PTX: see nvcc.sh. No GPU
# is needed to build.
export CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=12040
"$toolkit"/cargo_zigbuild-*.data/scripts/cargo-zigbuild zigbuild --release --locked --package outliers-worker \
    ${features[@]+"${features[@]}"} --target "$target.$glibc"

mkdir -p "$(dirname "$output")"
# Processes of the old program keep using it.
cp "$build/$target/release/outliers-worker" "$output.part"
if [ ${#features[@]} -gt 0 ]; then
    # So that drivers need not compile them.
    find "$build/$target"/release/build/candle-kernels-*/out worker/cuda -name '*.ptx' \
        -exec python3 worker/cuda/assemble.py "$output.part" "$toolkit" {} +
fi
mv -f "$output.part" "$output"
"$output" version
# The worker's description, for controllers on machines that cannot run it.
"$output" version --json > "$output.json.part"
mv -f "$output.json.part" "$output.json"
echo "$output: $(($(wc -c < "$output") / 1000000)) MB, $(($(gzip -c "$output" | wc -c) / 1000000)) MB compressed"
