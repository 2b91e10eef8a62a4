#!/usr/bin/env bash
# Compiles the kernels into the PTX beside them, which is checked in: who builds the worker need
# not compile it, and a machine without the compiler tests it. The first line of each tells what it
# was made from; a test compares.
#
#     worker/cuda/kernels/build.sh [NAME..]      all, if none is named
set -euo pipefail
cd "$(dirname "$0")"

[ $# -gt 0 ] || set -- *.cu
toolkit=$(../../toolkit.sh)
export CUDA_HOME=$toolkit/nvidia/cu13 REAL_NVCC=$toolkit/nvidia/cu13/bin/nvcc
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in "$@"; do
    name=$(basename "$name" .cu)
    # Nothing is contracted: a product is rounded before it is added, as on the CPU.
    ../nvcc.sh --ptx --gpu-architecture=compute_80 --fmad=false --std=c++17 -O3 --output-directory "$work" "$name.cu"
    {
        echo "// sha256 of values.cuh and $name.cu: $(cat values.cuh "$name.cu" | sha256sum | cut -d ' ' -f 1)"
        # The compiler's remarks name nothing that is used.
        grep -v '^\s*//' "$work/$name.ptx" | cat -s
    } > "$name.ptx"
done
