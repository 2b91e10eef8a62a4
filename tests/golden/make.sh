#!/usr/bin/env bash
# Makes the fixtures of this folder again: tiny checkpoints in published layouts, golden activations of Hugging Face
# transformers, and outlier statistics by an independent program.
#
#   tests/golden/make.sh ORACLE_FOLDER [PYTHON]
#
# ORACLE_FOLDER holds make_model.py, golden.py and outliers_ref.py; PYTHON has transformers and torch. Files are the same
# byte for byte for the same versions of those.
set -euo pipefail
oracle=$(realpath "${1:?usage: make.sh ORACLE_FOLDER [PYTHON]}") python=$(realpath -s "${2:-python3}")
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONDONTWRITEBYTECODE=1

make() { # name, family, seed, dtype, shards, size
    local out="$here/$1"
    rm -rf "$out" && mkdir -p "$out"
    cd "$oracle"
    "$python" make_model.py --family "$2" --out "$out/model" --seed "$3" --dtype "$4" --shards "$5" --size "$6" >/dev/null
    "$python" golden.py --model "$out/model" --out "$out/golden.safetensors" --tokens 48 --seqs 3 --seed 0 >/dev/null
    "$python" outliers_ref.py --golden "$out/golden.safetensors" --out "$out/outliers.json" --positions
    echo "$1 $(du -sh "$out" | cut -f1)"
}

make olmoe-bf16 olmoe 1 bf16 1 '{"num_experts":8,"num_experts_per_tok":3}'
make olmoe-f32-sharded olmoe 2 f32 3 '{"num_experts":6,"num_experts_per_tok":5,"clip_qkv":1.5,"norm_topk_prob":true}'
make llama-f32 llama 3 f32 1 tiny
make llama-bf16-sharded-tied llama 4 bf16 3 '{"tie_word_embeddings":true,"attention_bias":true,"mlp_bias":true}'
