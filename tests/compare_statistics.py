#!/usr/bin/env python3
"""Compares a run's results.json with the reference's statistics: counts, shares and verdicts exactly,
extremes to 1e-4."""
import json
import sys

reference, results = (json.load(open(path)) for path in sys.argv[1:3])
corpus, wrong = reference["corpus"], []


def same(what, got, want):
    if got != want:
        wrong.append(f"{what}: {got}, reference {want}")


got = {f["dim"]: f for f in results["features"]}
same("features with an occurrence", sorted(got), [f["dim"] for f in corpus["features"]])
for want in corpus["features"]:
    have = got.get(want["dim"], {})
    for key in ("n_sites", "n_layers", "n_positions", "occurrences", "sided", "layer_fraction", "position_fraction"):
        same(f"feature {want['dim']} {key}", have.get(key), want[key])
    same(f"feature {want['dim']} systematic", have.get("systematic_by_layers"), want["systematic"])
    for key in ("max", "min", "max_abs"):
        if abs(have.get(key, 1e30) - want[key]) > 1e-4 * max(1, abs(want[key])):
            wrong.append(f"feature {want['dim']} {key}: {have.get(key)}, reference {want[key]}")
count = {(v["reading"], v["axis"]): v["count"] for v in results["verdicts"]}
same("unique by layers", count["unique", "layers"], corpus["n_systematic"])
same("sum over sequences by layers", count["sum_over_sequences", "layers"], reference["sum_over_sequences"]["n_systematic"])
for have, want in zip(results["per_sequence"], reference["per_sequence"], strict=True):
    same(f"sequence {want['sequence']}", (have["features_any"], have["systematic_by_layers"]),
         (want["n_features_any"], want["n_systematic"]))
print("\n".join(wrong) or f"statistics equal, {corpus['n_systematic']} systematic features")
sys.exit(bool(wrong))
