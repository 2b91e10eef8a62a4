#!/usr/bin/env python3
"""Makes exports.safetensors of some checkpoints of tests/golden again: the figures of --export,
computed in numpy from the inputs of the modules of Hugging Face transformers. Also reads a worker's
imatrix.gguf with llama.cpp's own package.

    exports.py golden ORACLE_FOLDER     (needs torch, transformers, gguf; ORACLE_FOLDER is the folder of hf.py and golden.py)
    exports.py check IMATRIX.gguf       (needs gguf)

The names of matrices come from `gguf`'s map of the checkpoint's names.
"""
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "golden"
# Fixture: llama.cpp's name of its family.
NAMES = {"llama-f32": "llama", "olmoe-f32-sharded": "olmoe", "deepseek-v2-lite": "deepseek2", "qwen3-5-moe": "qwen35moe"}


def name_map(family, layers):
    import gguf
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    return gguf.get_tensor_name_map(arch, layers)


class Sums:
    """Statistics of a matrix's input, by column."""

    def __init__(self):
        self.rows, self.squares, self.values, self.largest = 0, 0.0, 0.0, 0.0

    def add(self, x):
        self.rows += len(x)
        self.squares = self.squares + (x ** 2).sum(0)
        self.values = self.values + x.sum(0)
        self.largest = np.maximum(self.largest, np.abs(x).max(0, initial=0))


def matrix(x):
    return x.detach().double().numpy().reshape(-1, x.shape[-1])


def silu(x):
    return x / (1 + np.exp(-x))


def watch(model):
    """Statistics of each module's input by name, per expert; sums for saliencies by (module, expert)."""
    import torch
    inputs, outputs, savings = defaultdict(Sums), defaultdict(Sums), defaultdict(list)

    def linear(name):
        def hook(_module, arguments, out):
            inputs[name].add(matrix(arguments[0]))
            outputs[name].add(matrix(out if torch.is_tensor(out) else out[0]))
        return hook

    def experts(name):
        def hook(module, arguments):
            x, chosen, weights = (matrix(argument) for argument in arguments[:3])
            both, down = (weight.detach().double().numpy() for weight in (module.gate_up_proj, module.down_proj))
            for expert in range(len(down)):
                rows, places = np.nonzero(chosen == expert)
                gate, up = np.split(x[rows] @ both[expert].T, 2, axis=-1)
                inner = silu(gate) * up
                inputs[f"{name}.gate_up_proj", expert].add(x[rows])
                inputs[f"{name}.down_proj", expert].add(inner)
                norms = np.linalg.norm(inner @ down[expert].T, axis=-1)
                savings[name, expert] = list(weights[rows, places] * norms) + savings[name, expert]
        return hook

    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(experts(name))
        elif getattr(module, "weight", None) is not None and module.weight.dim() == 2 and ".layers." in name:
            module.register_forward_hook(linear(name))
    return inputs, outputs, savings


def golden(name, family, hf):
    from safetensors.numpy import save_file
    from safetensors.torch import load_file
    import torch
    model = hf.load_oracle(GOLDEN / name / "model")
    config = model.config.get_text_config()
    inputs, outputs, savings = watch(model)
    with torch.no_grad():
        model(load_file(GOLDEN / name / "golden.safetensors")["input_ids"])
    names, found = name_map(family, config.num_hidden_layers), {}

    def store(tensor, sums, columns=slice(None)):
        """sums: one for each expert or head"""
        found[f"{tensor}.weight.counts"] = np.array([[of.rows] for of in sums])
        for what, of in (("in_sum2", "squares"), ("in_sum", "values")):
            width = max(np.size(getattr(each, of)) for each in sums)
            rows = [np.broadcast_to(getattr(each, of), width)[columns] for each in sums]
            found[f"{tensor}.weight.{what}"] = np.stack(rows)

    modules = defaultdict(dict)
    for key, sums in inputs.items():
        module, expert = key if isinstance(key, tuple) else (key, None)
        modules[module][expert] = sums
    for module, sums in modules.items():
        plain = module.replace("model.language_model.", "model.")
        each = [sums[expert] for expert in sorted(sums, key=lambda expert: expert or 0)]
        is_stacked = None not in sums
        found[f"act_scales.{module}"] = np.stack([np.broadcast_to(of.largest, max(np.size(s.largest) for s in each)) for of in each])
        if module.endswith("experts.gate_up_proj"):
            for part in ("gate_proj", "up_proj"):
                store(names.get_name(plain.replace("gate_up_proj", part)), each)
        elif module.endswith("linear_attn.out_proj") and family.startswith("qwen35"):
            # A conversion regroups the value heads, of which these are the columns.
            heads, keys = config.linear_num_value_heads, config.linear_num_key_heads
            order = np.arange(np.size(each[0].squares)).reshape(keys, heads // keys, -1).transpose(1, 0, 2).reshape(-1)
            store(names.get_name(plain), each, order)
        else:
            store(names.get_name(plain), each)
        if module.endswith("kv_b_proj"):
            # The other half of it is multiplied into the queries.
            heads, nope = config.num_attention_heads, config.qk_nope_head_dim
            of_queries = outputs[module.replace("kv_b_proj", "q_b_proj" if config.q_lora_rank else "q_proj")]
            width = np.size(of_queries.squares) // heads
            store(names.get_name(plain.replace("kv_b", "v_b")), each * heads)
            key = names.get_name(plain.replace("kv_b", "k_b"))
            for part, values in (("in_sum2", of_queries.squares), ("in_sum", of_queries.values)):
                found[f"{key}.weight.{part}"] = values.reshape(heads, width)[:, :nope]
            found[f"{key}.weight.counts"] = np.full((heads, 1), of_queries.rows)
        assert is_stacked == ("experts." in module and "shared" not in module), module
    for module in sorted({module for module, _ in savings}):
        layer = module.split(".layers.")[1].split(".")[0]
        of = [savings[module, expert] for expert in sorted(expert for name, expert in savings if name == module)]
        found[f"reap.{layer}"] = np.array([[len(each), np.mean(each) if each else np.nan] for each in of])
    save_file({key: np.ascontiguousarray(value, np.float32) for key, value in found.items()}, GOLDEN / name / "exports.safetensors")
    print(name, len(found), "tensors")


def check(path):
    import gguf
    file = gguf.GGUFReader(path)
    text = lambda key: [bytes(file.fields[key].parts[part]).decode() for part in file.fields[key].data]
    assert text("general.type") == ["imatrix"], text("general.type")
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        assert key in file.fields, key
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    weights = sorted({name.rsplit(".", 1)[0] for name in tensors})
    for weight in weights:
        squares, counts = tensors[f"{weight}.in_sum2"], tensors[f"{weight}.counts"]
        assert squares.shape == tensors[f"{weight}.in_sum"].shape and counts.shape == (len(squares), 1), weight
        assert np.isfinite(squares).all() and (squares >= 0).all(), weight
        # As llama-quantize has it: a column's importance is its mean square.
        unused = int((counts == 0).sum())
        print(f"{weight:40} {str(squares.shape):14} rows {int(counts.sum()):8} never hit {unused}")
    print(len(weights), "matrices, of", text("outliers.llama_architecture")[0])


def main():
    if sys.argv[1] == "check":
        return check(sys.argv[2])
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path(sys.argv[2]).resolve()))
    import hf
    import oracle
    oracle.teach(hf)
    for name, family in NAMES.items():
        golden(name, family, hf)


if __name__ == "__main__":
    main()
