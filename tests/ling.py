#!/usr/bin/env python3
"""Makes tests/golden/ling. Transformers has no class for Ling 2.0, so its forward pass is implemented
here, in numpy and f64.

    ling.py ORACLE

ORACLE is the folder of outliers_ref.py, which computes the statistics. Token ids, weights and activations
that are near a tie (an expert choice, a threshold) are drawn again.
"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parent / "golden" / "ling"
CONFIG = {
    "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 200, "rms_norm_eps": 1e-6,
    "rope_theta": 600000, "rope_scaling": None, "partial_rotary_factor": 0.5, "max_position_embeddings": 32768, "num_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 20, "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 20, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "router_dtype": "fp32", "use_qk_norm": True, "use_qkv_bias": False,
    "use_bias": False, "use_rmsnorm": True, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True, "eos_token_id": 199,
    "pad_token_id": 199, "attention_dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0,
}
SEQUENCES, TOKENS, THRESHOLD = 2, 32, 6.0


def weights(rng):
    """Random weights with the published names; two features have large gains."""
    c = CONFIG
    hidden, heads, kv, d = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    matrix = lambda rows, columns: rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
    gain = lambda width: rng.uniform(0.5, 1.5, width).astype(np.float32)
    w = {"model.word_embeddings.weight": matrix(c["vocab_size"], hidden) * np.float32(hidden**0.5), "model.norm.weight": gain(hidden),
         "lm_head.weight": matrix(c["vocab_size"], hidden)}
    mlp = lambda name, width: w.update({f"{name}.gate_proj.weight": matrix(width, hidden), f"{name}.up_proj.weight": matrix(width, hidden),
                                        f"{name}.down_proj.weight": matrix(hidden, width)})
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            w[f"{at}.{norm}.weight"] = gain(hidden)
            w[f"{at}.{norm}.weight"][[5, 17]] = [5, 4]
        w[f"{at}.attention.query_key_value.weight"] = matrix((heads + 2 * kv) * d, hidden)
        w[f"{at}.attention.dense.weight"] = matrix(hidden, heads * d)
        w[f"{at}.attention.query_layernorm.weight"], w[f"{at}.attention.key_layernorm.weight"] = gain(d), gain(d)
        if layer < c["first_k_dense_replace"]:
            mlp(f"{at}.mlp", c["intermediate_size"])
            continue
        w[f"{at}.mlp.gate.weight"] = matrix(c["num_experts"], hidden)
        w[f"{at}.mlp.gate.expert_bias"] = rng.normal(0, 0.1, c["num_experts"]).astype(np.float32)
        mlp(f"{at}.mlp.shared_experts", c["num_shared_experts"] * c["moe_intermediate_size"])
        for expert in range(c["num_experts"]):
            mlp(f"{at}.mlp.experts.{expert}", c["moe_intermediate_size"])
    return w


class Ling:
    """The forward pass by its definition. `mask` multiplies every studied norm's output; `seen` receives the recorded values."""

    def __init__(self, w):
        self.w = {name: value.astype(np.float64) for name, value in w.items()}

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG["rms_norm_eps"]) * self.w[f"{name}.weight"]

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T

    def mlp(self, x, name):
        gate = self.linear(x, f"{name}.gate_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def rotated(self, x):
        """`x` [heads, tokens, width]: pairs (i, i + half) of the first part of a head."""
        width = int(x.shape[-1] * CONFIG["partial_rotary_factor"])
        half = width // 2
        angles = np.arange(x.shape[1])[:, None] * CONFIG["rope_theta"] ** (-2 * np.arange(half) / width)
        a, b = x[..., :half], x[..., half:width]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), x[..., width:]], -1)

    def attention(self, x, at):
        """Attention of one sequence, and the largest share of each query."""
        heads, kv, d = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["head_dim"]
        qkv = self.linear(x, f"{at}.query_key_value").reshape(len(x), heads + 2 * kv, d).transpose(1, 0, 2)
        query, key, value = qkv[:heads], qkv[heads:heads + kv], qkv[heads + kv:]
        query = self.rotated(self.norm(query, f"{at}.query_layernorm"))
        key = self.rotated(self.norm(key, f"{at}.key_layernorm")).repeat(heads // kv, 0)
        scores = query @ key.transpose(0, 2, 1) * d**-0.5
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = shares @ value.repeat(heads // kv, 0)
        return self.linear(mixed.transpose(1, 0, 2).reshape(len(x), -1), f"{at}.dense"), shares.max(-1)

    def experts(self, x, at, seen, layer):
        scores = 1 / (1 + np.exp(-self.linear(x, f"{at}.gate")))
        biased = scores + self.w[f"{at}.gate.expert_bias"]
        grouped = biased.reshape(len(x), CONFIG["n_group"], -1)
        judged = np.sort(grouped, -1)[..., -2:].sum(-1)
        best = np.sort(judged, -1)
        lost = judged < best[:, [-CONFIG["topk_group"]]]
        biased = np.where(np.repeat(lost, grouped.shape[-1], 1), -np.inf, biased)
        order = np.argsort(-biased, -1)
        k = CONFIG["num_experts_per_tok"]
        chosen = np.sort(order[:, :k], -1)
        weights = np.take_along_axis(scores, chosen, -1)
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20) * CONFIG["routed_scaling_factor"]
        ranked = np.take_along_axis(biased, order, -1)
        margins = np.minimum(ranked[:, k - 1] - ranked[:, k], best[:, -CONFIG["topk_group"]] - best[:, -CONFIG["topk_group"] - 1])
        seen[f"router.{layer}.indices"], seen[f"router.{layer}.weights"], seen[f"router.{layer}.margin"] = chosen, weights, margins
        out = self.mlp(x, f"{at}.shared_experts")
        for expert in range(CONFIG["num_experts"]):
            rows, places = np.nonzero(chosen == expert)
            out[rows] += weights[rows, places, None] * self.mlp(x[rows], f"{at}.experts.{expert}")
        return out

    def forward(self, ids, mask=1.0, others=()):
        """Everything recorded; and by layer the mean largest share, with the norm's output as it is and with each of `others`."""
        seen, sharp = {"input_ids": ids.astype(np.int64)}, []
        x = self.w["model.word_embeddings.weight"][ids]
        flat = lambda x: x.reshape(-1, x.shape[-1])
        for layer in range(CONFIG["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            seen[f"layer.{layer}.site.0"] = n = self.norm(x, f"{at}.input_layernorm") * mask
            sharp.append([np.mean([self.attention(sequence * other, f"{at}.attention")[1] for sequence in n]) for other in (1.0, *others)])
            x = x + np.stack([self.attention(sequence, f"{at}.attention")[0] for sequence in n])
            seen[f"layer.{layer}.site.1"] = n = self.norm(x, f"{at}.post_attention_layernorm") * mask
            is_dense = layer < CONFIG["first_k_dense_replace"]
            out = self.mlp(flat(n), f"{at}.mlp") if is_dense else self.experts(flat(n), f"{at}.mlp", seen, layer)
            x = x + out.reshape(x.shape)
        seen["final_norm"] = self.norm(x, "model.norm")
        seen["logits"] = logits = self.linear(seen["final_norm"], "lm_head")
        logs = logits - logits.max(-1, keepdims=True)
        logs = (logs - np.log(np.exp(logs).sum(-1, keepdims=True)))[:, :-1]
        seen["nll"] = -np.take_along_axis(logs, ids[:, 1:, None], -1)[..., 0]
        return seen, {"mean_nll": float(seen["nll"].mean()), "top_probability": float(np.exp(logs.max(-1)).mean()), "sharp": sharp}


def near_a_tie(seen):
    margins = [value.min() for name, value in seen.items() if name.endswith(".margin")]
    gaps = [np.abs(np.abs(value) - THRESHOLD).min() for name, value in seen.items() if name.startswith("layer.")]
    return min(margins + gaps) < 1e-4


def main():
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path(sys.argv[1]).resolve()))
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from outliers_ref import analyse

    import ablation

    for seed in range(100):
        rng = np.random.default_rng(seed)
        model, ids = weights(rng), rng.integers(0, CONFIG["vocab_size"], (SEQUENCES, TOKENS))
        ling = Ling(model)
        seen, _ = ling.forward(ids)
        if not near_a_tie(seen):
            break
    subprocess.run(["rm", "-rf", FOLDER], check=True)
    (FOLDER / "model").mkdir(parents=True)
    (FOLDER / "model" / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(model, FOLDER / "model" / "model.safetensors", metadata={"format": "pt"})
    stored = {name: np.ascontiguousarray(value if value.dtype == np.int64 else value.astype(np.float32)) for name, value in seen.items()}
    save_file(stored, FOLDER / "golden.safetensors", metadata={"golden": json.dumps({"format": "oracle-golden-1", "seed": seed})})
    (FOLDER / "outliers.json").write_text(json.dumps(analyse(FOLDER / "golden.safetensors", with_positions=True), indent=1) + "\n")
    features = ablation.strongest(stored)
    removed = [[], features, ablation.drawn(features, CONFIG["hidden_size"])]
    masks = [ablation.kept(each, CONFIG["hidden_size"]) for each in removed]
    sharp = np.array(ling.forward(ids, others=masks[1:])[1]["sharp"])
    arms = []
    for arm, (each, mask) in enumerate(zip(removed, masks)):
        predicted = ling.forward(ids, mask)[1]
        arms.append({"features": each, "mean_nll": predicted["mean_nll"], "top_probability": predicted["top_probability"],
                     "attention_by_layer": sharp[:, arm].tolist()})
    (FOLDER / "ablation.json").write_text(json.dumps(arms, indent=1) + "\n")
    print(f"seed {seed}, features {features}, {sum(f.stat().st_size for f in FOLDER.rglob('*') if f.is_file()) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
