#!/usr/bin/env bash
# What the worker computes on NVIDIA GPUs that this machine's processor stands for (`tests/gpu/`): no GPU is needed, and nothing is said of speed.
#
#     tests/gpu.sh [WORKER]
#
# WORKER is built by `worker/build.sh --cuda`, here if none is given. Needs Python 3 with numpy and safetensors, as PYTHON or the search
# path has it.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

worker=${1:-}
if [ -z "$worker" ]; then
    worker=$work/worker
    worker/build.sh --cuda --output "$worker"
fi
worker=$(realpath "$worker")
tests/gpu/install_fake_driver.sh "$work/gpu"

# Runs something with so many GPUs, whose streams take up to so many microseconds longer now and then.
with() {
    local gpus=$1 delay=$2
    shift 2
    env RUST_BACKTRACE=0 LD_LIBRARY_PATH="$work/gpu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" OUTLIERS_GPUS="$gpus" OUTLIERS_GPU_DELAY_US="$delay" "$@"
}

with 2 0 "$worker" devices
echo "== weights on their way"
CUDARC_CUDA_VERSION=12040 OUTLIERS_GPU="$work/gpu" cargo test --locked --quiet --package outliers-cuda --features staging
echo "== every fixture"
with 1 0 "$python" tests/oracle.py goldens "$worker" --devices cuda:0
with 1 0 "$python" tests/oracle.py goldens "$worker" --devices cuda:0 --precision bf16
with 3 3000 "$python" tests/oracle.py goldens "$worker" --devices cuda:0,cuda:1,cuda:2

echo "== no bit depends on how long streams take, on how many GPUs there are, or on what is loaded at once"
results() {
    local gpus=$1 delay=$2 budget=$3 fixture=$4 devices=cuda:0 i
    for ((i = 1; i < gpus; i++)); do devices=$devices,cuda:$i; done
    rm -rf "$work/results"
    with "$gpus" "$delay" "$worker" run --model "$fixture/model" --token-ids "$fixture/golden.safetensors" --sites all \
        --output "$work/results" --devices "$devices" --stream-budget "$budget" 2> "$work/said" || { cat "$work/said" >&2; return 1; }
    sha256sum < "$work/results/results.json"
}
for fixture in tests/golden/*/; do
    [ -e "$fixture/golden.safetensors" ] || continue
    expected=$(results 1 0 1GB "$fixture")
    for how in "1 2000 1GB" "1 2000 1MB" "2 2000 1GB" "3 500 1MB"; do
        # shellcheck disable=SC2086
        got=$(results $how "$fixture")
        [ "$got" = "$expected" ] || { echo "FAIL $fixture: GPUs, delay, budget $how change the results"; exit 1; }
    done
    echo "ok   $(basename "$fixture")"
done

echo "== what a run copies to its GPU and back is counted"
fixture=tests/golden/olmoe-bf16
with 1 0 "$worker" run --model "$fixture/model" --token-ids "$fixture/golden.safetensors" --output "$work/copied" \
    --devices cuda:0 2> "$work/said"
# It holds assembled kernels, and goes back to PTX where a GPU refuses them, as this one does.
grep -q "assembled for other GPUs" "$work/said"
"$python" - "$work/copied" "$fixture" <<'EOF'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
metadata, results = (json.loads((folder / name).read_text()) for name in ("metadata.json", "results.json"))
there, back = metadata["host_to_device_bytes"], metadata["device_to_host_bytes"]
# All weights but the embedding cross, in bf16.
vocab = json.loads(pathlib.Path(sys.argv[2], "model/config.json").read_text())["vocab_size"]
assert there >= 2 * (metadata["model"]["parameters"] - vocab * results["hidden"]), there
# Of the logits comes back what their likelihoods need, and norm outputs in f32 at most.
tokens = results["sequences"] * results["tokens_per_sequence"]
assert 0 < back < 4 * tokens * (results["hidden"] * results["n_sites"] + vocab), back
print(f"host to device {there} bytes, device to host {back} bytes")
EOF

echo "== no more of a GPU's memory than planned, however far it is behind"
for layers in 1 3; do
    with 1 0 env OUTLIERS_GPU_MEMORY=80000000000 OUTLIERS_GPU_PEAK="$work/peak" "$worker" bench run --model tests/published/gpt-oss-120b \
        --weights synthetic:1 --layers $layers --devices cuda:0 --precision bf16 --num-sequences 1 --sequence-length 8 --json > "$work/bench.json"
    planned=$("$python" -c "import json; print(json.load(open('$work/bench.json'))['planned_memory_bytes'])")
    taken=$(cat "$work/peak")
    echo "$layers layers of gpt-oss-120b: $((taken / 1000000)) MB of $((planned / 1000000)) planned"
    [ "$taken" -le "$planned" ]
done
