"""Makes the files beside this script: files of PyTorch, and their contents as safetensors files.

    python make.py        # PyTorch 2.15, safetensors 0.8

Every run makes the same files, except for addresses in legacy.bin and module.bin.
"""
import os
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent


class System:
    """Unpickled by Python, this would run a command."""

    def __reduce__(self):
        return os.system, ("echo unpickled > /tmp/unpickled",)


def tensors():
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 8
    mask = torch.tril(torch.ones(4, 4, dtype=torch.uint8)).view(1, 1, 4, 4)
    state = OrderedDict()
    state["f32"] = values
    for name, dtype in [("f64", torch.float64), ("f16", torch.float16), ("bf16", torch.bfloat16), ("i64", torch.int64),
                        ("i32", torch.int32), ("i16", torch.int16), ("i8", torch.int8), ("u8", torch.uint8)]:
        state[name] = (values * 8).to(dtype)
    state["bool"] = values > 0.5
    state["scalar"] = torch.tensor(-1e9)
    state["empty"] = torch.zeros(0, 4)
    state["tied"] = values
    state["rows"] = values[1:]
    state["column"] = values.reshape(12)[4:8].reshape(4, 1)
    state["parameter"] = torch.nn.Parameter(values.reshape(2, 6) + 1)
    # GPT-J's masks: one storage for all layers.
    state["h.0.attn.bias"] = mask
    state["h.1.attn.bias"] = mask
    state["strided.transposed"] = values.t()
    state["strided.expanded"] = values[:1].expand(2, 4)
    state["strided.every_other"] = values[:, ::2]
    state["not_a_tensor"] = 7
    state._metadata = OrderedDict({"": {"version": 1}, "h": {"version": 2, "scale": 0.5, "names": ["a", "b"], "on": True}})
    return state


def others():
    """What state dictionaries hold beside plain tensors, and tensors that are pickled in other ways than those."""
    values = torch.arange(4, dtype=torch.float32)
    state = OrderedDict(values=values)
    state["transposed"] = torch.arange(6, dtype=torch.float32).reshape(2, 3).t()
    for name in ["complex64", "complex32", "float8_e4m3fn", "float8_e8m0fnu", "uint16"]:
        state[name] = values.to(getattr(torch, name))
    state["qint8"] = torch.quantize_per_tensor(values, 1.0, 0, torch.qint8)
    state["negated"] = torch._neg_view(values)
    state["attribute"] = values.clone()
    state["attribute"].note = "a"
    state["parameter"] = torch.nn.Parameter(values + 1)
    state["parameter"].note = "b"
    state["buffer"] = torch.nn.Buffer(values + 2)
    state["sparse"] = torch.eye(2).to_sparse()
    state["meta"] = torch.zeros(2, device="meta")
    state.update(step=3, rate=0.5, on=True, nothing=None, large=2**80, text="c", raw=b"d", array=bytearray(b"e"), complex=1j,
                 names=["f", values], pair=(1, values), set={1, 2}, size=values.size(), dtype=torch.bfloat16,
                 device=torch.device("cpu"), optimizer={"state": {0: {"exp_avg": values}}, "lr": 0.1})
    return state


def main():
    state = tensors()
    torch.save(state, HERE / "tensors.bin")
    torch.save(OrderedDict(second=torch.arange(3, dtype=torch.float16)), HERE / "second.bin")
    torch.save(OrderedDict(a=torch.zeros(2)), HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(2), "b": System()}, HERE / "system.bin")
    torch.save(torch.nn.Linear(2, 1), HERE / "module.bin")
    for protocol in [2, 3, 4, 5]:
        torch.save(others(), HERE / f"others-{protocol}.bin", pickle_protocol=protocol)
    whole = {k: v.detach().clone().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
    save_file({k: v for k, v in whole.items() if not k.startswith("strided.")}, HERE / "tensors.safetensors")


if __name__ == "__main__":
    main()
