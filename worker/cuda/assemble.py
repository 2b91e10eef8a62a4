#!/usr/bin/env python3
"""Assembles the kernels that a worker holds as PTX, and appends them to the worker, where
`src/assembled.rs` finds them.

    assemble.py WORKER TOOLKIT PTX..

TOOLKIT holds the assemblers that `worker/build.sh` fetches. Only PTX files that are in the worker are
assembled.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import zlib

# What CUDA 11.8 assembles, every driver that the worker takes loads. GPUs of 10.0 and 12.0 need
# newer drivers anyway.
ASSEMBLERS = {"cu11": [80, 86, 89, 90], "cu12": [100, 120]}
# Never launched.
UNUSED = {"quantized.ptx"}
MAGIC = b"cubins 1"


def assemble(ptxas, compute, ptx):
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "cubin"
        subprocess.run([ptxas, f"-arch=sm_{compute}", "-o", cubin, ptx], check=True)
        return zlib.compress(cubin.read_bytes(), 9)


def main():
    worker, toolkit = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    program = worker.read_bytes()
    texts = {}
    for path in map(pathlib.Path, sys.argv[3:]):
        text = path.read_bytes()
        if path.name not in UNUSED and text in program:
            texts[text] = path
    if not texts:
        sys.exit(f"{worker} holds none of the PTX files")
    wanted = [
        (text, compute, toolkit / f"ptxas-{cuda}" / "nvidia/cuda_nvcc/bin/ptxas")
        for text in texts
        for cuda, computes in ASSEMBLERS.items()
        for compute in computes
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        cubins = list(threads.map(lambda one: assemble(one[2], one[1], texts[one[0]]), wanted))
    index, at = b"", 0
    for (text, compute, _), cubin in zip(wanted, cubins):
        index += hashlib.sha256(text).digest() + struct.pack("<3Q", compute, at, len(cubin))
        at += len(cubin)
    end = struct.pack("<2Q", len(wanted), at + len(index) + 24) + MAGIC
    with worker.open("ab") as file:
        file.write(b"".join(cubins) + index + end)
    print(f"{len(texts)} modules assembled for {len(wanted) // len(texts)} architectures: {at / 1e6:.1f} MB")


main()
