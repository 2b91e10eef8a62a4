#!/usr/bin/env bash
# Fetches the linker and the CUDA compiler that toolkit.txt names, once, and prints their folder.
# Needs Python 3 with pip.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "the toolkit is for Linux on x86_64; on $(uname -sm) take the worker of a release, or build in a container:" \
        "docs/devices.md" >&2
    exit 1
fi
build=${CARGO_TARGET_DIR:-target}
toolkit=$build/toolkit/$(sha256sum worker/toolkit.txt | cut -c 1-16)
if [ ! -e "$toolkit" ]; then
    echo "fetching linker and CUDA compiler (260 MB)" >&2
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
    # The archives lack executable permissions.
    chmod +x "$fresh/ziglang/zig" "$fresh"/cargo_zigbuild-*.data/scripts/* "$fresh"/nvidia/cu13/bin/* \
        "$fresh"/nvidia/cu13/nvvm/bin/* "$fresh"/ptxas-cu1[12]/nvidia/cuda_nvcc/bin/ptxas
    mv "$fresh" "$toolkit" 2>/dev/null || { [ -e "$toolkit" ] && rm -rf "$fresh"; }
fi
cd "$toolkit" && pwd
