#!/usr/bin/env python3
"""Computes the reference in f64, where rounding in f32 is too coarse to distinguish two implementations.

    oracle_f64.py ORACLE FOLDER        FOLDER has model/ and golden.safetensors; writes f64.safetensors beside them

Every f32 of torch is an f64 here. The names are exchanged before transformers is imported, so that
casts to f32 inside its modules are casts to f64.
"""
import json
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

torch.float32 = torch.float = torch.float64
torch.Tensor.float = torch.Tensor.double
torch.set_default_dtype(torch.float64)

from safetensors.numpy import load_file, save_file  # noqa: E402

import oracle  # noqa: E402


def widen(path):
    """Rewrites a safetensors file with F64 for F32, which safetensors would read as the f64 that torch.float32 now is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body, values = json.loads(data[8 : 8 + length]), data[8 + length :], b""
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        first, last = tensor["data_offsets"]
        stored = body[first:last]
        if tensor["dtype"] == "F32":
            tensor["dtype"], stored = "F64", np.frombuffer(stored, "<f4").astype("<f8").tobytes()
        tensor["data_offsets"] = [len(values), len(values) + len(stored)]
        values += stored
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def main():
    folder = Path(sys.argv[2])
    oracle.load_oracle(sys.argv[1])
    import golden
    import hf

    hf.TORCH["f32"] = torch.float64
    with tempfile.TemporaryDirectory() as temporary:
        wide = Path(shutil.copytree(folder / "model", Path(temporary) / "model"))
        for file in wide.glob("*.safetensors"):
            widen(file)
        model = hf.load_oracle(wide, "f32").double()
    ids = torch.tensor(load_file(folder / "golden.safetensors")["input_ids"])
    values, _ = golden.record(model, ids)
    save_file({name: tensor.contiguous().numpy() for name, tensor in values.items()}, folder / "f64.safetensors")


if __name__ == "__main__":
    main()
