#!/usr/bin/env python3
"""Makes measures.json of some checkpoints of tests/golden again: the figures of --measure, computed in
numpy from activations and attention weights of Hugging Face transformers. The tests compare the
worker with it.

    measures.py ORACLE_FOLDER

ORACLE_FOLDER is the folder of hf.py and golden.py. Largest values come with their dimension.
"""
import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = ["llama-f32", "gpt-oss-mxfp4", "deepseek-v2-lite"]
# Low, so that some of 64 dimensions are sinks.
THRESHOLD = 2.0


def grid(mantissa_bits, least, most):
    """All numbers >= 0 of a small float format."""
    step = 2.0 ** (least - mantissa_bits)
    values, top = [i * step for i in range(2 ** mantissa_bits)], least
    while values[-1] < most:
        values += [2.0 ** top * (1 + i / 2 ** mantissa_bits) for i in range(2 ** mantissa_bits)]
        top += 1
    return np.array([v for v in values if v <= most])


E2M1, E4M3 = grid(1, 0, 6.0), grid(3, -6, 448.0)


def nearest(x, numbers):
    """The nearest of the numbers, by search. A tie goes to the even mantissa, which has an even index."""
    magnitude = np.minimum(np.abs(x), numbers[-1])
    above = np.clip(np.searchsorted(numbers, magnitude), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    to_high = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    return np.where(to_high, high, low) * np.sign(x)


def blocks(x, size):
    return [x[at:at + size] for at in range(0, len(x), size)]


def largest(x):
    return np.abs(x).max()


def quantize(x, kind):
    if kind == "int8_per_token":
        scale = largest(x) / 127
        return np.rint(x / scale) * scale
    if kind == "nvfp4":
        of_row = largest(x) / (448 * 6)
    out = []
    for block in blocks(x, {"fp8_per_128": 128, "mxfp4": 32, "nvfp4": 16}[kind]):
        if largest(block) == 0:
            scale = 0
        elif kind == "fp8_per_128":
            scale = largest(block) / 448
        elif kind == "mxfp4":
            scale = 2.0 ** (np.floor(np.log2(largest(block))) - 2)
        else:
            scale = nearest(largest(block) / 6 / of_row, E4M3) * of_row
        out.append(nearest(block / scale, E4M3 if kind == "fp8_per_128" else E2M1) * scale if scale else 0 * block)
    return np.concatenate(out)


def hadamard(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def rotate(x, size):
    whole = len(x) // size * size if size else 0
    turned = [block @ hadamard(size) for block in blocks(x[:whole], size)] if whole else []
    return np.concatenate([*turned, x[whole:]])


def quantization(x):
    """x: [rows, hidden]"""
    out = []
    for rotation in (0, 16, 32, 128):
        for kind, group in (("int8_per_token", 128), ("fp8_per_128", 128), ("mxfp4", 32), ("nvfp4", 16)):
            total = inside = outlier = count = 0
            for row in x:
                turned = rotate(row, rotation)
                lost = (quantize(turned, kind) - turned) ** 2 / (row ** 2).sum()
                for error, before in zip(blocks(lost, max(group, rotation)), blocks(row, max(group, rotation)), strict=True):
                    is_outlier = largest(before) >= THRESHOLD
                    total, inside = total + error.sum(), inside + error.sum() * is_outlier
                    outlier, count = outlier + int(is_outlier), count + 1
            out.append({"rotation": rotation, "format": kind, "error": total / len(x), "share_in_outlier_blocks": inside / total,
                        "outlier_blocks": outlier / count})
    return out


def sinks(x):
    """x: [tokens, hidden]"""
    rms = np.sqrt((x ** 2).mean(-1, keepdims=True))
    tokens = (np.abs(x) >= THRESHOLD * rms).mean(0)
    shares = (x ** 2 / (x ** 2).sum(-1, keepdims=True)).mean(0)
    dims = sorted(np.nonzero(tokens >= 0.5)[0], key=lambda dim: -shares[dim])
    return {"n_dims": len(dims), "share_of_squares": float(sum(shares[dim] for dim in dims)),
            "dims": [{"dim": int(dim), "share_of_tokens": float(tokens[dim]), "share_of_squares": float(shares[dim])} for dim in dims[:20]]}


def most_sinks(residual, found):
    """residual: [layers, sequences, tokens, hidden]; found: result of sinks() per layer. Of the layer with the largest share: the share
    of each sequence, and the map of the first"""
    most = max(range(len(found)), key=lambda layer: (found[layer]["share_of_squares"], layer))
    x, hidden = residual[most], residual.shape[-1]
    rms = np.sqrt((x ** 2).mean(-1, keepdims=True))
    are_sinks = (np.abs(x) >= THRESHOLD * rms).mean((0, 1)) >= 0.5
    shares = (x ** 2 / (x ** 2).sum(-1, keepdims=True)).mean(1)
    orders = [np.argsort(-share, kind="stable") for share in shares]
    each = [float(sum(share[dim] for dim in order[:20] if are_sinks[dim])) for share, order in zip(shares, orders, strict=True)]
    largest = orders[0][:8].tolist()
    others = sorted({(2 * i + 1) * hidden // 16 for i in range(8)} - set(largest))
    dims = [{"dim": dim, "is_sink": bool(are_sinks[dim]), "values": (x / rms)[0, :64, dim].tolist()} for dim in largest + others]
    return {"per_sequence": each if are_sinks.any() else [], "map": {"layer": most, "dims": dims}}


def place(x):
    """x: [sequences, hidden] -> its largest value"""
    sequence, dim = np.unravel_index(np.abs(x).argmax(), x.shape)
    return {"value": float(x[sequence, dim]), "dim": int(dim)}


def spikes(residual, attention, mlp):
    """Each: [layers, sequences, tokens, hidden]"""
    out, before = [], None
    for x, a, m in zip(residual, attention, mlp, strict=True):
        unit = (x[:, 0] / np.linalg.norm(x[:, 0], axis=-1, keepdims=True)).mean(0)
        cosine = None if before is None else float(unit @ before / np.linalg.norm(unit) / np.linalg.norm(before))
        out.append({"first": float(np.abs(x[:, 0]).max(-1).mean()), "others": float(np.abs(x[:, 1:]).max(-1).mean()),
                    "residual": place(x[:, 0]), "attention_out": place(a[:, 0]), "mlp_out": place(m[:, 0]),
                    "attention_out_others": float(largest(a[:, 1:])), "mlp_out_others": float(largest(m[:, 1:])),
                    "agreement": float(np.linalg.norm(unit)), "cosine_with_previous": cosine,
                    "margins": (np.abs(x[:, 0]).max(-1) - 10 * np.abs(x[:, 1:]).max(-1).mean(-1)).tolist()})
        before = unit
    return out


def attention_sinks(weights, window, residual):
    """weights: [sequences, heads, queries, keys]; window: keys that a query sees, or None"""
    seen = slice(1, window)
    heads = weights[:, :, seen, 0].mean((0, 2))
    return {"first_key": float(heads.mean()), "heads": heads.tolist(), "largest_hidden": float(np.abs(residual).max(-1).mean())}


def attention_of_sequences(weights, windows, residual):
    """Each: one per layer, as attention_sinks() takes it"""
    shares = [of_layer[:, :, 1:window, 0].mean((1, 2)) for of_layer, window in zip(weights, windows, strict=True)]
    return {"first_key": np.mean(shares, 0).tolist(), "largest_hidden": np.abs(residual).max(-1).mean((0, 2)).tolist()}


def main():
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path(sys.argv[1]).resolve()))
    import golden
    import hf
    import oracle
    from safetensors.torch import load_file

    oracle.teach(hf)
    for name in NAMES:
        ids = load_file(GOLDEN / name / "golden.safetensors")["input_ids"]
        model = hf.load_oracle(GOLDEN / name / "model")
        weights, handles = [], []
        for block in hf.layers_of(model):
            handles.append(block.self_attn.register_forward_hook(lambda _m, _a, out: weights.append(out[1].double().numpy())))
        found, _ = golden.record(model, ids, debug=True)
        for handle in handles:
            handle.remove()
        values = {key: value.double().numpy() for key, value in found.items()}
        layers, hidden = len(weights), values["debug.0.block_out"].shape[-1]
        all_of = lambda what: np.stack([values[f"debug.{layer}.{what}"] for layer in range(layers)])
        residual, attention, mlp = all_of("block_out"), all_of("attn_out"), all_of("mlp_out")
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * layers
        windows = [model.config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        found_sinks = [sinks(x.reshape(-1, hidden)) for x in residual]
        document = {
            "quantization": [{"layer": layer, "errors": quantization(values[f"layer.{layer}.site.{site}"].reshape(-1, hidden))}
                             for layer in range(layers) for site in range(2)],
            "residual_quantization": quantization(residual[-1].reshape(-1, hidden)),
            "residual_sinks": found_sinks,
            "most_sinks": most_sinks(residual, found_sinks),
            "spike_life": spikes(residual, attention, mlp),
            "attention_sinks": [attention_sinks(*each) for each in zip(weights, windows, residual, strict=True)],
            "attention_of_sequences": attention_of_sequences(weights, windows, residual),
        }
        (GOLDEN / name / "measures.json").write_text(json.dumps(document, indent=1) + "\n")
        print(name, [len(layer["dims"]) for layer in document["residual_sinks"]], document["attention_sinks"][0]["first_key"])


if __name__ == "__main__":
    main()
