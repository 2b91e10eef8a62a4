#!/bin/sh
# Stands in for the CUDA compiler while the kernels of the tensor library are built, so that one program serves every GPU from compute 8.0 up.
#
# - Kernels become PTX, which drivers compile for their GPU unless `assemble.py` has done that. Its
#   version is lowered to what drivers from R520 (CUDA 11.8) on read: the compiler writes its own newest,
#   which only its own year's drivers would, though it uses nothing newer.
# - Objects (products of quantised formats that are not used here) are left empty: they would run
#   on one architecture alone, and bring the CUDA runtime and 30 MB along.
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
