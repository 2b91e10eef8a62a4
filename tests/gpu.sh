#!/usr/bin/env bash
# Tests what the worker computes on NVIDIA GPUs, which this machine's processor emulates
# (`tests/gpu/`). It needs no GPU, and measures no speed.
#
#     tests/gpu.sh [WORKER]
#
# WORKER is built by `worker/build.sh --cuda`, here if none is given. Needs Python 3 with numpy and
# safetensors, from PYTHON or the search path.
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

# Runs a command with this many GPUs, whose streams are randomly delayed by up to this many
# microseconds.
with() {
    local gpus=$1 delay=$2
    shift 2
    env RUST_BACKTRACE=0 LD_LIBRARY_PATH="$work/gpu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" OUTLIERS_GPUS="$gpus" OUTLIERS_GPU_DELAY_US="$delay" "$@"
}

with 2 0 "$worker" devices
echo "== weights on their way"
CUDARC_CUDA_VERSION=12040 OUTLIERS_GPU="$work/gpu" cargo test --locked --quiet --package outliers-cuda --features staging
echo "== kernels do what the loops for CPUs do, bit by bit"
# The tensor library's kernels are empty here: these tests launch none of them.
with 1 300 env CUDA_HOME="$work/gpu" REAL_NVCC="$root/tests/gpu/nvcc.sh" NVCC="$root/worker/cuda/nvcc.sh" \
    CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=12040 \
    cargo test --locked --quiet --package outliers-worker --features cuda --test kernels --test routing
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
    got=$(OUTLIERS_GPU_PEERS=0 results 2 500 1GB "$fixture")
    [ "$got" = "$expected" ] || { echo "FAIL $fixture: GPUs that do not reach each other change the results"; exit 1; }
    echo "ok   $(basename "$fixture")"
done

echo "== what a run copies to its GPU and back is counted"
fixture=tests/golden/olmoe-bf16
with 1 0 "$worker" run --model "$fixture/model" --token-ids "$fixture/golden.safetensors" --output "$work/copied" \
    --devices cuda:0 2> "$work/said"
# The worker has assembled kernels and falls back to PTX if a GPU refuses them, as this one does.
grep -q "assembled for other GPUs" "$work/said"
"$python" - "$work/copied" "$fixture" <<'EOF'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
metadata, results = (json.loads((folder / name).read_text()) for name in ("metadata.json", "results.json"))
there, back = metadata["host_to_device_bytes"], metadata["device_to_host_bytes"]
# All weights except the embedding are copied as stored, in bf16: half the size that the pass uses.
vocab = json.loads(pathlib.Path(sys.argv[2], "model/config.json").read_text())["vocab_size"]
weights = 2 * (metadata["model"]["parameters"] - vocab * results["hidden"])
assert weights <= there < 1.5 * weights, (there, weights)
# Back come, of each norm output and sequence, 2,048 bins of 8 bytes, 24 bytes per row and 48 per
# column. All else together is less than half of the logits in f32, which are not copied.
sequences, length = results["sequences"], results["tokens_per_sequence"]
summaries = sequences * results["n_sites"] * (2048 * 8 + 24 * length + 48 * results["hidden"])
assert summaries <= back < summaries + 2 * sequences * length * vocab, (back, summaries)
print(f"host to device {there} bytes, device to host {back} bytes")
EOF

echo "== as many tokens are computed together as a GPU has memory for"
for how in "8000000000 64" "540000000 32" "8000000000 1 --micro-batch-tokens 1"; do
    read -r memory expected option <<< "$how"
    rm -rf "$work/results"
    # shellcheck disable=SC2086
    with 1 0 env OUTLIERS_GPU_MEMORY="$memory" "$worker" run --model "$fixture/model" --token-ids "$fixture/golden.safetensors" \
        --output "$work/results" --devices cuda:0 $option 2> "$work/said" || { cat "$work/said" >&2; exit 1; }
    got=$("$python" -c "import json; print(json.load(open('$work/results/metadata.json'))['micro_batch_tokens'])")
    [ "$got" = "$expected" ] || { echo "FAIL $how: $got tokens were computed together"; exit 1; }
done

echo "== quantised weights cross as they are stored"
for name in deepseek-v3-fp8 deepseek-v3-small-tiles gpt-oss-mxfp4 kimi-k2-int4 qwen3-moe-nvfp4; do
    fixture=tests/golden/$name
    rm -rf "$work/copied"
    with 1 0 "$worker" run --model "$fixture/model" --token-ids "$fixture/golden.safetensors" --output "$work/copied" \
        --devices cuda:0 --precision bf16 2> "$work/said"
    "$python" - "$work/copied" "$fixture" <<'EOF'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
metadata, results = (json.loads((folder / name).read_text()) for name in ("metadata.json", "results.json"))
vocab = json.loads(pathlib.Path(sys.argv[2], "model/config.json").read_text())["vocab_size"]
there, decoded = metadata["host_to_device_bytes"], 2 * (metadata["model"]["parameters"] - vocab * results["hidden"])
assert 0 < there < decoded, (there, decoded)
print(f"ok   {pathlib.Path(sys.argv[2]).name}: {there} bytes for {decoded} decoded")
EOF
done
with 1 0 "$worker" bench decode --values 8192 --rounds 1 --device cuda:0

echo "== both forms of attention agree"
with 1 0 env OUTLIERS_GPU_LAUNCHES="$work/launches" "$worker" bench attention --lengths 40,150 --heads 2 --rounds 1 --device cuda:0
for widths in 64_64 80_80 96_96 128_128 192_128 256_256; do
    # Of both lengths, once to warm up and once to be timed, and as often with a window and sinks.
    grep -qE "^8 attention_${widths}$" "$work/launches"
done

echo "== a value that is no number is named as on the CPU"
fixture=tests/golden/deepseek-v3-small-tiles
cp -r "$fixture/model" "$work/damaged"
"$python" - "$work/damaged/model.safetensors" <<'EOF'
import json, pathlib, struct, sys

path = pathlib.Path(sys.argv[1])
file = bytearray(path.read_bytes())
(length,) = struct.unpack("<Q", file[:8])
header = json.loads(file[8 : 8 + length])
begin, _ = header["model.layers.0.mlp.down_proj.weight"]["data_offsets"]
# NaN in FP8 E4M3.
file[8 + length + begin + 5] = 0x7F
path.write_bytes(file)
EOF
for device in cpu cuda:0; do
    if with 1 0 "$worker" run --model "$work/damaged" --token-ids "$fixture/golden.safetensors" --output "$work/none.$device" \
        --devices "$device" 2> "$work/said"; then
        echo "FAIL a damaged checkpoint was run on $device"
        exit 1
    fi
    grep "^error: .*mlp.down_proj.weight holds NaN at element 5$" "$work/said" > "$work/said.$device"
done
cmp "$work/said.cpu" "$work/said.cuda:0"

echo "== norms, rotations, softmax and gates are one kernel each, for all sequences together"
# A dense and an MoE model: all launches of a run over this many sequences.
for fixture in llama-f32 olmoe-bf16; do
    for sequences in 1 2; do
        with 1 0 env OUTLIERS_GPU_LAUNCHES="$work/launches" "$worker" run --model "tests/golden/$fixture/model" \
            --token-ids "tests/golden/$fixture/golden.safetensors" --num-sequences $sequences \
            --output "$work/launched-$fixture-$sequences" --devices cuda:0 2> "$work/said"
        for kernel in rms_norm rope softmax gate sum; do grep -qE "^[0-9]+ ${kernel}_(f32|bf16)$" "$work/launches"; done
        # Launches of the tensor library for the same.
        if grep -E ' u(exp|sqrt|silu|sqr)_' "$work/launches"; then exit 1; fi
        grep -oE '^[0-9]+ (product|softmax.*)$' "$work/launches" > "$work/launches.$sequences"
        awk -v of="$fixture, $sequences sequences" '{ n += $1 } END { print of ": " n " launches" }' "$work/launches"
    done
    [ "$(awk '/softmax/ { print $1 }' "$work/launches.1")" = "$(awk '/softmax/ { print $1 }' "$work/launches.2")" ]
done
# The last is of the mixture, whose experts get few rows each: several are multiplied by one call,
# beside the one that gets ready.
grep -qE '^([2-9]|[0-9]{2,}) grouped product$' "$work/launches" || { cat "$work/launches"; exit 1; }

echo "== the recurrence of a layer is one kernel, for all tokens and sequences together"
# With how many layers that have one.
for of in "kimi-linear 2" "qwen3-next 3" "nemotron-h 2"; do
    read -r fixture layers <<< "$of"
    for sequences in 1 2; do
        with 1 0 env OUTLIERS_GPU_LAUNCHES="$work/launches" "$worker" run --model "tests/golden/$fixture/model" \
            --token-ids "tests/golden/$fixture/golden.safetensors" --num-sequences $sequences \
            --output "$work/launched-$fixture-$sequences" --devices cuda:0 2> "$work/said"
        [ "$(awk '$2 ~ /^recurrence_/ { n += $1 } END { print n }' "$work/launches")" = "$layers" ]
    done
done

echo "== no more of a GPU's memory than planned, however far it is behind"
# Half as wide, and with fewer experts and words: each value is decoded by interpreted kernels.
mkdir "$work/narrow"
"$python" - tests/published/gpt-oss-120b/config.json "$work/narrow/config.json" <<'EOF'
import json, pathlib, sys

config = json.loads(pathlib.Path(sys.argv[1]).read_text())
config |= {"hidden_size": 1440, "intermediate_size": 1440, "num_local_experts": 8, "vocab_size": 20000}
config |= {"eos_token_id": 1, "pad_token_id": 0}
pathlib.Path(sys.argv[2]).write_text(json.dumps(config))
EOF
for layers in 1 3; do
    with 1 0 env OUTLIERS_GPU_MEMORY=80000000000 OUTLIERS_GPU_PEAK="$work/peak" "$worker" bench run --model "$work/narrow" \
        --weights synthetic:1 --layers $layers --devices cuda:0 --precision bf16 --num-sequences 1 --sequence-length 8 --json > "$work/bench.json"
    planned=$("$python" -c "import json; print(json.load(open('$work/bench.json'))['planned_memory_bytes'])")
    taken=$(cat "$work/peak")
    "$python" -c "
import json
table = json.load(open('$work/bench.json'))
assert {'host to device', 'device to host'} <= {row['work'] for row in table['rows']}, table
assert 0 <= table['idle']['for_weights'] + table['idle']['for_host'] <= 1, table
"
    echo "$layers layers of a narrow gpt-oss: $((taken / 1000000)) MB of $((planned / 1000000)) planned"
    [ "$taken" -le "$planned" ]
done
