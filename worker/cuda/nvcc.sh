#!/bin/sh
# Stands in for the CUDA compiler while the kernels of the tensor library are built, so that one
# program runs on every GPU of compute capability 8.0 or newer.
#
# - Kernels become PTX, which drivers compile for their GPU unless `assemble.py` has done that. The
#   compiler writes its newest PTX version, which older drivers refuse, although the kernels use
#   nothing newer. The version is lowered to that of drivers from R520 (CUDA 11.8) on.
# - Objects (products of quantised formats that are not used here) are left empty. They would run on
#   one architecture only, and add the CUDA runtime and 30 MB.
#
# REAL_NVCC is the compiler.
set -eu

output='' folder='' kind=''
previous=''
for argument in "$@"; do
    case $previous in
        -o) output=$argument ;;
        --output-directory) folder=$argument ;;
    esac
    case $argument in
        --ptx) kind=ptx ;;
        -c) kind=object ;;
    esac
    previous=$argument
    source=$argument
done

case $kind in
    object) exec "${NVCC_CCBIN:-cc}" -x c -c -o "$output" /dev/null ;;
    ptx)
        "$REAL_NVCC" "$@"
        name=$(basename "$source" .cu).ptx
        sed -i 's/^\.version [0-9.]*$/.version 7.8/' "$folder/$name"
        ;;
    *) exec "$REAL_NVCC" "$@" ;;
esac
