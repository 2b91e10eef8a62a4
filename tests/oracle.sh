#!/usr/bin/env bash
# Compares the worker with Hugging Face transformers over seeds, sizes, dtypes and shardings: activations at every studied
# norm, final norm, logits, likelihoods and expert choices, and the outlier statistics computed independently from them.
#
#   tests/oracle.sh ORACLE_FOLDER [PYTHON]          SEEDS="1 2 3" SIZES="tiny small" FAMILIES="olmoe llama"
#
# ORACLE_FOLDER holds make_model.py, golden.py, outliers_ref.py and compare.py; PYTHON has transformers, torch and numpy.
set -euo pipefail
oracle=$(realpath "${1:?usage: oracle.sh ORACLE_FOLDER [PYTHON]}") python=$(realpath -s "${2:-$(command -v python3)}")
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONDONTWRITEBYTECODE=1
(cd "$root" && cargo build --workspace --bins --quiet)
worker="$root/target/debug/outliers-worker"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0 passed=0

one() { # family, seed, size, dtype, shards
    local name="$1 seed $2 $3 $4 in $5 files" at="$scratch/case"
    rm -rf "$at" && mkdir "$at"
    (
        cd "$oracle"
        "$python" make_model.py --family "$1" --seed "$2" --size "$3" --dtype "$4" --shards "$5" --out "$at/model" >/dev/null
        "$python" golden.py --model "$at/model" --tokens 96 --seqs 4 --seed "$2" --out "$at/golden.safetensors" >/dev/null
        "$python" outliers_ref.py --golden "$at/golden.safetensors" --out "$at/outliers.json"
    )
    if "$worker" run --model "$at/model" --token-ids "$at/golden.safetensors" --precision f32 --output "$at/out" \
        --save-activations activations.safetensors >"$at/log" 2>&1 &&
        "$python" "$oracle/compare.py" --golden "$at/golden.safetensors" --candidate "$at/out/activations.safetensors" \
            --atol 1e-4 --rtol 1e-4 >"$at/log" 2>&1 &&
        "$python" "$root/tests/compare_statistics.py" "$at/outliers.json" "$at/out/results.json" >>"$at/log" 2>&1; then
        passed=$((passed + 1))
        echo "ok    $name: $(tail -n 1 "$at/log")"
    else
        failed=$((failed + 1))
        echo "FAIL  $name"
        grep -v '^ok' "$at/log" | head -n 8
    fi
}

for family in ${FAMILIES:-olmoe llama}; do
    for seed in ${SEEDS:-1 2 3}; do
        for size in ${SIZES:-tiny small}; do
            one "$family" "$seed" "$size" bf16 1
            one "$family" "$seed" "$size" f32 3
        done
    done
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
