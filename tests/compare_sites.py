#!/usr/bin/env python3
"""Compares the figures of `--sites all` with an implementation of their definitions in numpy.

    compare_sites.py GOLDEN RESULTS STATISTICS [MODEL_FOLDER]

GOLDEN is made by the reference's golden.py with --debug in f32; RESULTS and STATISTICS are the run's results.json and
statistics.safetensors over the same token ids. With MODEL_FOLDER (unquantised layout of Llama or
OLMoE), gains and single experts' outputs are compared, too. Counts, places and token ids must be
equal, values within 1e-4, and quantiles within their resolution of 1.6 %.
"""
import json
import struct
import sys
from pathlib import Path

import numpy as np

DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "F16": "<f2"}
wrong, compared = [], 0


def load(path):
    raw = Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + size + at for at in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw[start:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw[start:end], DTYPES[entry["dtype"]])
        out[name] = values.reshape(entry["shape"])
    return out


def same(what, got, want):
    global compared
    compared += 1
    if got != want:
        wrong.append(f"{what}: {got}, reference {want}")


def near(what, got, want, tolerance=1e-4):
    global compared
    compared += 1
    if got is None or abs(got - want) > tolerance * max(abs(want), 1e-6):
        wrong.append(f"{what}: {got}, reference {want}")


def lower_median(x, axis=None):
    x = np.abs(x).reshape(-1) if axis is None else np.abs(x)
    return np.take(np.sort(x, axis=-1), (x.shape[-1] - 1) // 2, axis=-1)


def row_statistics(what, got, x):
    """x: [rows, hidden]"""
    x = x.astype(np.float64)
    magnitudes = np.sort(np.abs(x).reshape(-1))
    same(f"{what} rows", got["rows"], len(x))
    for key, p in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99_9", 0.999)):
        near(f"{what} |x| {key}", got["magnitude"][key], magnitudes[int(np.ceil(p * len(magnitudes))) - 1], 0.0165)
    centred = x - x.mean(-1, keepdims=True)
    kurtosis = (centred ** 4).mean(-1) / (centred ** 2).mean(-1) ** 2
    ratio = np.abs(x).max(-1) / lower_median(x, -1)
    for key, values in (("kurtosis", kurtosis), ("max_over_median", ratio)):
        same(f"{what} {key} rows", got[key]["rows"], len(x))
        # A row's median may be one of two close values when activations differ in the last digits.
        near(f"{what} {key} mean", got[key]["mean"], values.mean(), 1e-3)
        near(f"{what} {key} max", got[key]["max"], values.max(), 1e-2 if key == "max_over_median" else 1e-3)


def top_records(what, got, layers, ids):
    """layers: {layer: [tokens, hidden]}"""
    n = len(got)
    flat = np.concatenate([np.abs(x).reshape(-1) for x in layers.values()])
    same(f"{what} records", n, min(100, len(flat)))
    for i, (record, want) in enumerate(zip(got, np.sort(flat)[::-1][:n])):
        near(f"{what} record {i}", abs(record["value"]), want)
        token = record["sequence"] * ids.shape[1] + record["position"]
        near(f"{what} record {i} at its place", record["value"], layers[record["layer"]][token, record["dim"]])
        same(f"{what} record {i} token id", record["token_id"], int(ids.reshape(-1)[token]))


def massive_hits(x):
    """x: [S, N, H] -> masks of massive values by the median of their sequence, and of their token"""
    a = np.abs(x)
    medians = np.stack([lower_median(s) for s in x])[:, None, None], lower_median(x, -1)[..., None]
    return tuple((a > 100) & (a >= 1000 * median.astype(np.float64)) for median in medians)


def massive(got, layers, ids):
    """layers: {layer: [S, N, H]}"""
    tokens, dims, total, total_token, found = set(), {}, 0, 0, []
    for layer, x in layers.items():
        a, have = np.abs(x), got["layers"][layer]
        hit, hit_token = massive_hits(x)
        same(f"massive layer {layer}", [have["values"], have["tokens"], have["values_by_token_median"], have["tokens_by_token_median"]],
             [int(hit.sum()), int(hit.any(-1).sum()), int(hit_token.sum()), int(hit_token.any(-1).sum())])
        near(f"massive layer {layer} median", have["mean_median"], np.mean([lower_median(s) for s in x]))
        for i, want in enumerate(np.sort(a.reshape(len(a), -1), -1)[:, ::-1][:, :3].mean(0)):
            near(f"massive layer {layer} top {i + 1}", have["mean_top_magnitudes"][i], want)
        total, total_token = total + int(hit.sum()), total_token + int(hit_token.sum())
        found += [layer] if hit.any() else []
        for s, t, d in zip(*np.nonzero(hit)):
            tokens.add((int(s), int(t)))
            dims.setdefault(int(d), set()).add(layer)
    same("massive onset", got["onset_layer"], min(found, default=None))
    same("massive last", got["last_layer"], max(found, default=None))
    same("massive totals", [got["values"], got["values_by_token_median"], got["tokens"], got["tokens_at_position_0"], got["sequences"], got["n_dims"]],
         [total, total_token, len(tokens), sum(t == 0 for _, t in tokens), len({s for s, _ in tokens}), len(dims)])
    for dim in got["dims"]:
        same(f"massive dim {dim['dim']}", dim["n_layers"], len(dims.get(dim["dim"], ())))


def router(got, statistics, indices, weights, ids):
    layer, experts = got["layer"], got["experts"]
    first = np.zeros(ids.shape, bool)
    first[:, 0] = True
    first = first.reshape(-1)
    tokens = np.array([(indices == e).sum() for e in range(experts)])
    mass = np.array([weights[indices == e].sum(dtype=np.float64) for e in range(experts)])
    mass_first = np.array([weights[first][indices[first] == e].sum(dtype=np.float64) for e in range(experts)])
    same(f"router {layer} never hit", got["never_hit"], int((tokens == 0).sum()))
    near(f"router {layer} imbalance", got["max_over_mean"], tokens.max() / tokens.mean())
    same(f"router {layer} busiest", got["busiest"], int(tokens.argmax()))
    share = tokens[tokens > 0] / tokens.sum()
    near(f"router {layer} entropy", got["normalised_entropy"], -(share * np.log(share)).sum() / np.log(experts))
    near(f"router {layer} mass", got["gate_mass_per_token"], weights.sum(dtype=np.float64) / len(weights))
    near(f"router {layer} mass at 0", got["gate_mass_per_token_at_position_0"], weights[first].sum(dtype=np.float64) / first.sum())
    favourite = got["favourite_at_position_0"]
    near(f"router {layer} favourite", mass_first[favourite], mass_first.max())
    near(f"router {layer} favourite's share", got["favourite_share_at_position_0"], mass_first[favourite] / mass_first.sum())
    elsewhere = mass - mass_first
    near(f"router {layer} favourite elsewhere", got["favourite_share_elsewhere"], elsewhere[favourite] / elsewhere.sum())
    same(f"router {layer} tokens", statistics[f"router.{layer}.tokens"].tolist(), tokens.tolist())
    same(f"router {layer} tokens at 0", statistics[f"router.{layer}.tokens_at_position_0"].tolist(),
         [int((indices[first] == e).sum()) for e in range(experts)])
    for e in range(experts):
        near(f"router {layer} mass of {e}", statistics[f"router.{layer}.gate_mass"][e], mass[e])


def experts_of(model, golden, layer, experts, hidden):
    """{expert: (tokens, outputs)} from the MLP's input, for silu-gated experts."""
    x, indices = golden[f"layer.{layer}.site.1"].reshape(-1, hidden), golden[f"router.{layer}.indices"]
    out = {}
    for e in range(experts):
        rows = np.nonzero((indices == e).any(-1))[0]
        gate, up, down = (model[f"model.layers.{layer}.mlp.experts.{e}.{m}_proj.weight"].astype(np.float64) for m in ("gate", "up", "down"))
        g = x[rows].astype(np.float64) @ gate.T
        out[e] = (rows, (g / (1 + np.exp(-g)) * (x[rows].astype(np.float64) @ up.T)) @ down.T)
    return out


def super_experts(got, statistics, peaks, n_layers):
    considered = round(0.75 * n_layers)
    a = {(l, e): np.abs(y).max() for (l, e), (_, y) in peaks.items() if l < considered and len(y)}
    values = np.array(list(a.values()))
    same("super experts considered", [got["layers_considered"], got["experts_considered"]], [considered, len(values)])
    near("super experts P99.5", got["percentile_99_5"], np.percentile(values, 99.5))
    near("super experts max", got["max"], values.max())
    want = sorted(k for k, v in a.items() if v > np.percentile(values, 99.5) and v > 0.1 * values.max())
    same("super experts", sorted((c["layer"], c["expert"]) for c in got["candidates"]), want)
    for (layer, e), (rows, y) in peaks.items():
        have, token, dim = (statistics[f"expert.{layer}.{k}"][e] for k in ("peak", "peak_token", "peak_dim"))
        if not len(y):
            same(f"expert {layer}.{e} without tokens", [float(have), int(token), int(dim)], [0.0, -1, -1])
            continue
        near(f"expert {layer}.{e} peak", abs(have), np.abs(y).max())
        near(f"expert {layer}.{e} peak at its place", have, y[np.nonzero(rows == token)[0][0], dim])


def compare(golden, results, statistics, model):
    """Adds differences to `wrong`. `golden` and `model`: arrays by name; without a `model` gains and experts are left out."""
    ids, n_layers = golden["input_ids"], results["n_layers"]
    hidden = golden["layer.0.site.0"].shape[-1]
    names = {"attention_out": "attn_out", "mlp_out": "mlp_out", "residual": "block_out"}
    others = {(s["layer"], s["point"]): s for s in results["other_sites"]}
    records = {top["point"]: top["records"] for top in results["top_records"]}
    for point, name in names.items():
        layers = {layer: golden[f"debug.{layer}.{name}"] for layer in range(n_layers)}
        for layer, x in layers.items():
            have = others[layer, point]
            near(f"{point} {layer} max", have["max_abs"], np.abs(x).max())
            near(f"{point} {layer} rms", have["rms"], np.sqrt((x.astype(np.float64) ** 2).mean()))
            row_statistics(f"{point} {layer}", have["rows"], x.reshape(-1, hidden))
        top_records(point, records[point], {layer: x.reshape(-1, hidden) for layer, x in layers.items()}, ids)
        if point == "residual":
            massive(results["massive_activations"], layers, ids)
    points = {"before_attention": 0, "after_attention": 0, "before_mlp": 1, "after_mlp": 1}
    for site in results["sites"]:
        x = golden[f"layer.{site['layer']}.site.{points[site['point']]}"].reshape(-1, hidden)
        row_statistics(f"{site['point']} {site['layer']}", site["rows"], x)
    for summary in results.get("routers", []):
        layer = summary["layer"]
        router(summary, statistics, golden[f"router.{layer}.indices"], golden[f"router.{layer}.weights"], ids)
    if model:
        norms = {0: "input_layernorm", 1: "post_attention_layernorm"}
        gains = {(s["layer"], points[s["point"]]): model[f"model.layers.{s['layer']}.{norms[points[s['point']]]}.weight"] for s in results["sites"]}
        for i, site in enumerate(results["sites"]):
            gain = gains[site["layer"], points[site["point"]]]
            near(f"gain of site {i}", site["gain"]["max_abs"], np.abs(gain).max())
            same(f"gain of site {i}, in full", statistics["gain"][i].tolist(), gain.astype(np.float32).tolist())
        for feature in results["features"]:
            peak = feature["peak"]
            gain = float(gains[peak["layer"], points[peak["point"]]][feature["dim"]])
            near(f"feature {feature['dim']} gain", peak["gain"], gain)
            near(f"feature {feature['dim']} over gain", peak["value_over_gain"], peak["value"] / gain)
        peaks = {}
        for summary in results.get("routers", []):
            layer = summary["layer"]
            of_layer = experts_of(model, golden, layer, summary["experts"], hidden)
            peaks.update({(layer, e): v for e, v in of_layer.items()})
            row_statistics(f"expert_out {layer}", others[layer, "expert_out"]["rows"], np.concatenate([y for _, y in of_layer.values()]))
        if peaks:
            super_experts(results["super_experts"], statistics, peaks, n_layers)


def main():
    golden, results, statistics = load(sys.argv[1]), json.load(open(sys.argv[2])), load(sys.argv[3])
    model = {}
    for file in Path(sys.argv[4]).glob("*.safetensors") if len(sys.argv) > 4 else []:
        model.update(load(file))
    compare(golden, results, statistics, model)
    print("\n".join(wrong[:40]) or f"{compared} numbers equal")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
