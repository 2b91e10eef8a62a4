#!/usr/bin/env python3
"""Compares the worker's ablation with one by hooks on Hugging Face transformers, over the
checkpoints of tests/golden and the demo's.

    ablation.py ORACLE WORKER [--only NAME ..] [--write]

ORACLE is the folder of hf.py. In each checkpoint the three features of the largest magnitudes are
removed (in the demo the planted ones), and the same number of others that the worker draws. Hooks
set them to 0 in every norm's output, for the perplexity and the largest probability of the next
token. For the largest share that a query gives to a key, they are set to 0 layer by layer in the
attention's input alone. --write stores the results of transformers as ablation.json beside the
checkpoint, for the tests.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "golden"
TOLERANCE = 1e-4
DEMO = "demo"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("oracle", type=Path)
    parser.add_argument("worker", type=Path)
    parser.add_argument("--only", nargs="+", default=[DEMO, *sorted(f.parent.name for f in GOLDEN.glob("*/golden.safetensors"))])
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


def strongest(golden):
    """The three features of the largest magnitudes at any studied norm."""
    sites = [np.abs(values).max(axis=(0, 1)) for name, values in golden.items() if name.startswith("layer.")]
    return sorted(int(f) for f in np.argsort(-np.max(sites, axis=0))[:3])


def drawn(features, hidden, seed=0):
    """Equally many other features, drawn as the worker does."""
    whole = (1 << 64) - 1

    def mix(counter):
        z = (counter * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & whole
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
        return z ^ (z >> 31)

    others = [feature for feature in range(hidden) if feature not in features]
    return sorted(sorted(others, key=lambda feature: mix(mix(seed) ^ feature))[:len(features)])


def kept(features, hidden):
    """The mask that sets them to 0 in a norm's output."""
    mask = np.ones(hidden)
    mask[features] = 0
    return mask


def case(options, name, scratch, load_file):
    """Checkpoint, file of token ids, token ids, features."""
    folder = GOLDEN / name
    if name == DEMO:
        subprocess.run([options.worker, "demo-model", "--output", scratch / "model"], check=True, capture_output=True)
        planted = json.loads((scratch / "model/planted.json").read_text())["systematic"]
        ids = np.array(json.loads((folder / "ids.json").read_text()))
        return scratch / "model", folder / "ids.json", ids, sorted(feature["dim"] for feature in planted)
    golden = load_file(folder / "golden.safetensors")
    return folder / "model", folder / "golden.safetensors", golden["input_ids"], strongest(golden)


def worker(options, scratch, model, ids, features):
    command = [options.worker, "run", "--model", model, "--token-ids", ids, "--precision", "f32"]
    command += ["--ablate", ",".join(map(str, features)), "--output", scratch / "out"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return json.loads((scratch / "out/results.json").read_text())["ablation"]


def without(torch, features, hidden):
    kept = torch.ones(hidden)
    kept[features] = 0
    return kept


def predictions(torch, hf, model, ids, mask):
    """Mean negative log-likelihood, and mean of the largest probability, with a mask on every studied norm's output."""
    handles = [norm.register_forward_hook(lambda _m, _a, out: out * mask) for _i, _j, _n, norm in hf.sites_of(model)]
    logs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.double()[:, :-1], -1)
    for handle in handles:
        handle.remove()
    nll = -logs.gather(-1, ids[:, 1:, None])
    return float(nll.mean()), float(logs.max(-1).values.exp().mean())


def attention(torch, hf, model, ids, masks):
    """Mean of the largest attention weight per layer and mask, with the whole model's hidden states as input."""
    found, handles = {}, []
    norm_last = getattr(model.config, "do_layer_norm_before", True) is False

    def look(layer):
        def hook(module, args, kwargs, output):
            shares = [output[1]]
            for mask in masks[1:]:
                x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                # In a post-norm model the first layer reads the embedding, which is not a norm
                # output.
                x = x if norm_last and layer == 0 else x * mask
                inner = {**kwargs, "hidden_states": x} if "hidden_states" in kwargs else kwargs
                shares.append(module.forward(*(args if "hidden_states" in kwargs else (x, *args[1:])), **inner)[1])
            found[layer] = [float(weights.max(-1).values.double().mean()) for weights in shares]
        return hook

    for layer, block in enumerate(hf.layers_of(model)):
        module = getattr(block, "self_attn", getattr(block, "attn", None))
        # Nemotron-H names the module of every block `mixer`.
        if type(getattr(block, "mixer", None)).__name__.endswith("Attention"):
            module = block.mixer
        # In Kimi Linear, DeltaNet modules have this name, too.
        if module is not None and getattr(block, "block_type", None) != "linear_attention":
            handles.append(module.register_forward_hook(look(layer), with_kwargs=True))
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [[found.get(layer, [None] * len(masks))[arm] for layer in range(len(hf.layers_of(model)))] for arm in range(len(masks))]


def difference(ours, theirs):
    """The largest difference of one arm."""
    shares = [abs(a - b) for a, b in zip(ours["attention_by_layer"], theirs["attention_by_layer"], strict=True) if b is not None or a is not None]
    return max([abs(ours["perplexity"]["mean_nll"] - theirs["mean_nll"]), abs(ours["top_probability"] - theirs["top_probability"]), *shares])


def direct(torch, hf, checkpoint, ids, removed):
    """Figures of transformers, one entry per list of features."""
    model, ids = hf.load_oracle(checkpoint), torch.from_numpy(ids)
    hidden = hf.sites_of(model)[0][3].weight.shape[0]
    masks = [without(torch, features, hidden) for features in removed]
    arms = []
    for features, mask, by_layer in zip(removed, masks, attention(torch, hf, model, ids, masks), strict=True):
        nll, top = predictions(torch, hf, model, ids, mask)
        arms.append({"features": features, "mean_nll": nll, "top_probability": top, "attention_by_layer": by_layer})
    return arms


def main():
    options = arguments()
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(options.oracle.resolve()))
    import hf
    import oracle
    import torch
    from safetensors.numpy import load_file

    oracle.teach(hf)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    failed = False
    for name in options.only:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, file, ids, features = case(options, name, Path(scratch), load_file)
            ours = worker(options, Path(scratch), checkpoint, file, features)
            arms = direct(torch, hf, checkpoint, ids, [arm["features"] for arm in ours])
        worst = max(difference(a, b) for a, b in zip(ours, arms, strict=True))
        failed |= not worst <= TOLERANCE
        ratios = [f"{np.exp(arm['mean_nll'] - arms[0]['mean_nll']):.3f}" for arm in arms[1:]]
        print(f"{'ok  ' if worst <= TOLERANCE else 'FAIL'} {name:26} off by {worst:.1e}; perplexity x {ratios[0]}, others x {ratios[1]}", flush=True)
        if options.write:
            (GOLDEN / name / "ablation.json").write_text(json.dumps(arms, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
