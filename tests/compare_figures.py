#!/usr/bin/env python3
"""Compares the six figures of `outliers compare` with those of the reference's statistics.

    compare_figures.py REFERENCE CONTROLLER FOLDER

REFERENCE is the output of outliers_ref.py for a golden file, FOLDER a run of the worker over the
same token ids. Counts must be equal, and mean L % and S % to 1e-9. The figures are unique, mean per
sequence and sum over sequences (the predecessor's), each by layers and by norm outputs.
"""
import json
import subprocess
import sys


def shares(feature, axis, reference):
    """Share of layers or norm outputs, and of positions."""
    part = feature["layer_fraction"] if axis == "layers" else feature["n_sites"] / reference["n_sites"]
    return part, feature["position_fraction"]


def figures(reference):
    """Every count with its mean L % and S %, from the reference's features over all sequences and within each."""
    def systematic(part, axis):
        found = [shares(feature, axis, reference) for feature in part["features"]]
        return [s for s in found if s[0] >= reference["layer_fraction_min"] and s[1] >= reference["position_fraction_min"]]

    def figure(reading, axis, found, divisor=1):
        mean = [100 * sum(column) / len(found) for column in zip(*found)] or [None, None]
        return {"reading": reading, "axis": axis, "count": len(found) / divisor, "layers": mean[0], "positions": mean[1]}

    for axis in ("layers", "sites"):
        within = [s for part in reference["per_sequence"] for s in systematic(part, axis)]
        yield figure("unique", axis, systematic(reference["corpus"], axis))
        yield figure("mean_per_sequence", axis, within, len(reference["per_sequence"]))
        yield figure("sum_over_sequences", axis, within)


def compared(controller, folder):
    """Figures of `outliers compare`: (count, L %, S %) by reading and axis."""
    command = [controller, "compare", "--format", "json", folder]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    value = lambda estimate: estimate and estimate["value"]
    return {(f["reading"], f["axis"]): [value(f[key]) for key in ("count", "layers", "positions")]
            for f in printed["figures"] if f["source"] == "ours"}


def differences(reference, controller, folder):
    """Differences, as text."""
    ours, wrong = compared(controller, folder), []
    for want in figures(reference):
        have = ours.pop((want["reading"], want["axis"]), [None] * 3)
        theirs = [want["count"], want["layers"], want["positions"]]
        near = all(a == b or None not in (a, b) and abs(a - b) < 1e-9 for a, b in zip(have, theirs))
        if have[0] != theirs[0] or not near:
            wrong.append(f"{want['reading']} by {want['axis']}: {have}, reference {theirs}")
    return wrong + [f"{reading} by {axis}: the reference has no such figure" for reading, axis in ours]


def main():
    wrong = differences(json.load(open(sys.argv[1])), *sys.argv[2:4])
    print("\n".join(wrong) or "six figures equal")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
