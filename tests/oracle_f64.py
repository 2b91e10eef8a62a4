#!/usr/bin/env python3
"""What the reference computes in f64, where rounding in f32 is too coarse to tell two implementations apart.

    oracle_f64.py ORACLE FOLDER        FOLDER has model/ and golden.safetensors; writes f64.safetensors beside them

Every f32 of torch is an f64 here: the names are exchanged before transformers is imported, so that casts to f32
inside its modules are casts to f64.
"""
import sys
from pathlib import Path

import torch

torch.float32 = torch.float = torch.float64
torch.Tensor.float = torch.Tensor.double
torch.set_default_dtype(torch.float64)

from safetensors.numpy import load_file, save_file  # noqa: E402

import oracle  # noqa: E402


def main():
    folder = Path(sys.argv[2])
    oracle.load_oracle(sys.argv[1])
    import golden
    import hf

    hf.TORCH["f32"] = torch.float64
    model = hf.load_oracle(folder / "model", "f32").double()
    ids = torch.tensor(load_file(folder / "golden.safetensors")["input_ids"])
    values, _ = golden.record(model, ids)
    save_file({name: tensor.contiguous().numpy() for name, tensor in values.items()}, folder / "f64.safetensors")


if __name__ == "__main__":
    main()
