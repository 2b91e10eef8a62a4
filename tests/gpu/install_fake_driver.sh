#!/usr/bin/env bash
# Puts the emulated GPU into FOLDER, under the names by which programs look for a real one:
#     tests/gpu/install_fake_driver.sh FOLDER && LD_LIBRARY_PATH=FOLDER outliers-worker devices
set -euo pipefail
folder=$(realpath -m "${1:?usage: install_fake_driver.sh FOLDER}")
cd "$(dirname "$0")/../.."
cargo build --release --locked --quiet --package outliers-tests-gpu
mkdir -p "$folder"
cp "${CARGO_TARGET_DIR:-target}/release/liboutliers_gpu.so" "$folder/libcuda.so.1.part"
mv "$folder/libcuda.so.1.part" "$folder/libcuda.so.1"
ln -sf libcuda.so.1 "$folder/libcublas.so.12"
