#!/usr/bin/env python3
"""Compares the worker with Hugging Face transformers: same checkpoint, same token ids, same number of
threads, one run of each at a time.

    reference.py ORACLE WORKER [--families F ..] [--size tiny|small|JSON] [--seqs N] [--tokens N] [--threads N] [--json FILE]

ORACLE is the folder of make_model.py and bench_ref.py. The first makes a checkpoint in a family's
published layout with random weights. The second counts outliers in it with transformers (load in bf16
or f32, forward hooks on the norms). WORKER is the program, built with --release. Run it with a Python
that has torch, transformers, safetensors and numpy, on an idle machine.

Every process is pinned to the number of processors that it may have threads. The wall time of the
worker is that of the whole process, and that of transformers is loading and running: importing takes a
constant number of seconds. Peak memory is that of the process, from the system. `products` is the time
of the model's multiplications alone, at the rate of the worker's (`outliers-worker bench run`). If the
counts in f32 differ, the row says so and the exit code is 1.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FAMILIES = ["olmoe", "qwen3_moe", "gpt_oss", "llama4_scout", "deepseek_v3", "qwen3_next", "llama"]
# Wall against bf16, wall against f32, peak memory against either: what is aimed at.
TARGETS = {"wall_of_bf16": 0.2, "wall_of_f32": 0.8, "memory_of_bf16": 0.25, "memory_of_f32": 0.25}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("oracle", type=Path)
    parser.add_argument("worker", type=Path)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--size", default="small", help="as make_model.py takes it [default: small]")
    parser.add_argument("--seqs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker-precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    return parser.parse_args()


def timed(command, threads, cwd=None):
    """Runs a command on `threads` processors: its output, wall seconds, peak resident bytes."""
    processors = sorted(os.sched_getaffinity(0))[:threads]
    if len(processors) < threads:
        sys.exit(f"--threads {threads}: this process may use {len(processors)} processors")
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, processors))
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode} of: {' '.join(str(part) for part in command)}")
    return output, seconds, usage.ru_maxrss * 1024


def transformers(options, model, ids, dtype):
    command = [sys.executable, "bench_ref.py", "--model", model, "--golden", ids, "--dtype", dtype, "--threads", options.threads]
    output, _, memory = timed(command, options.threads, cwd=options.oracle)
    said = json.loads(output.splitlines()[-1])
    counted = {"occurrences": said["total_occurrences"], "systematic": said["n_systematic"]}
    return {"seconds": said["load_s"] + said["run_s"], "memory": memory, "counted": counted, "parameters": said["parameters"]}


def worker(options, model, ids, folder):
    command = [options.worker.resolve(), "run", "--model", model, "--token-ids", ids, "--output", folder]
    command += ["--devices", "cpu", "--precision", options.worker_precision]
    _, seconds, memory = timed(command, options.threads)
    results = json.loads((folder / "results.json").read_text())
    unique = next(v for v in results["verdicts"] if v["reading"] == "unique" and v["axis"] == "layers")
    counted = {"occurrences": results["total_occurrences"], "systematic": round(unique["count"])}
    return {"seconds": seconds, "memory": memory, "counted": counted}


def products(options, model):
    """Seconds of the pass's matrix products only, in the worker's precision."""
    ask = [options.worker.resolve(), "inspect", "--model", model, "--json"]
    ask += ["--num-sequences", options.seqs, "--sequence-length", options.tokens]
    operations = json.loads(timed(ask, options.threads)[0])["plan"]["flops"]
    bench = [options.worker.resolve(), "bench", "run", "--model", model, "--json", "--layers", 1, "--devices", "cpu"]
    bench += ["--num-sequences", 1, "--sequence-length", 64, "--precision", options.worker_precision]
    whole = json.loads(timed(bench, options.threads)[0])["rows"][-1]
    return operations / 1e9 / whole["ceiling"]


def compare(options, family, scratch):
    model, ids = scratch / "model", scratch / "ids.safetensors"
    make = [sys.executable, "make_model.py", "--family", family, "--out", model, "--seed", 1, "--size", options.size]
    subprocess.run([str(part) for part in make], cwd=options.oracle, check=True, stdout=subprocess.DEVNULL)
    config = json.loads((model / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    random = np.random.default_rng(0).integers(0, vocabulary - 64, (options.seqs, options.tokens))
    save_file({"input_ids": random.astype(np.int64)}, ids)
    ours = worker(options, model, ids, scratch / "out")
    theirs = {dtype: transformers(options, model, ids, dtype) for dtype in ("bf16", "f32")}
    ratios = {f"{name}_of_{dtype}": ours[key] / theirs[dtype][key]
              for name, key in (("wall", "seconds"), ("memory", "memory")) for dtype in theirs}
    same = options.worker_precision != "f32" or ours["counted"] == theirs["f32"]["counted"]
    return {"family": family, "worker": ours, "transformers": theirs, "products": products(options, model), "ratios": ratios,
            "same_counts": same}


def show(row):
    sides = [row["worker"], row["transformers"]["bf16"], row["transformers"]["f32"]]
    measured = [f"{seconds:9.2f}" for seconds in [row["products"]] + [side["seconds"] for side in sides]]
    measured += [f"{side['memory'] / 1e9:9.2f}" for side in sides]
    ratios = [f"{row['ratios'][name]:9.2f}{' ' if row['ratios'][name] <= most else '!'}" for name, most in TARGETS.items()]
    print(f"{row['family']:<14}" + "".join(measured + ratios), "" if row["same_counts"] else "COUNTS DIFFER", flush=True)


def head():
    print(f"{'':<14}{'seconds':>36}{'peak memory, GB':>27}{'wall, worker over':>20}{'memory, worker over':>20}")
    columns = ["products"] + ["worker", "bf16", "f32"] * 2
    print(f"{'family':<14}" + "".join(f"{name:>9}" for name in columns) + "".join(f"{name.split('_')[2]:>9} " for name in TARGETS))


def main():
    options = arguments()
    options.oracle = options.oracle.resolve()
    aims = ", ".join(f"{name.replace('_', ' ')} {most}x" for name, most in TARGETS.items())
    print(f"{options.seqs} x {options.tokens} tokens, {options.threads} threads; worker in {options.worker_precision}; aims: {aims} (! above)")
    head()
    rows = []
    for family in options.families:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(compare(options, family, Path(scratch)))
        show(rows[-1])
    if options.json:
        document = {"seqs": options.seqs, "tokens": options.tokens, "threads": options.threads, "size": options.size,
                    "worker_precision": options.worker_precision, "targets": TARGETS, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(0 if all(row["same_counts"] for row in rows) else 1)


if __name__ == "__main__":
    main()
