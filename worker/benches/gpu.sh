#!/usr/bin/env bash
# Tests what the worker computes on an NVIDIA GPU, and measures its speed. Needs no network and
# builds nothing.
#
#     worker/benches/gpu.sh WORKER [DEVICE] [OUT]
#
# WORKER is built by `worker/build.sh --cuda`, on any machine. DEVICE is cuda:0 by default. OUT is a
# folder for the tables. Needs Python 3 with numpy and safetensors. All parts run; the exit code is
# that of the first part that failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
worker=$(realpath "${1:?usage: gpu.sh WORKER [DEVICE] [OUT]}")
device=${2:-cuda:0}
out=$(realpath -m "${3:-$(mktemp -d)}")
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

part() {
    printf '\n== %s\n' "$1"
    shift
    "$@"
    local code=$?
    [ $code -eq 0 ] || { echo "FAILED with $code"; [ $failed -ne 0 ] || failed=$code; }
}

# Runs a command and prints the most GPU memory used, polled five times a second from the driver.
with_peak_memory() {
    local name=$1
    shift
    nvidia-smi --id="${device#cuda:}" --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=200 > "$out/$name.memory" 2>/dev/null &
    local watcher=$!
    "$@"
    local code=$?
    kill $watcher 2>/dev/null
    wait $watcher 2>/dev/null
    sort -n "$out/$name.memory" 2>/dev/null | sed -n '1s/^/GPU memory in MiB: before /p; $s/^/                   at most /p'
    return $code
}

# A published configuration at full width, with random weights, in bf16: DEPTH layers of it.
width() {
    local name=$1 depth=$2
    with_peak_memory "$name" timeout 240 "$worker" bench run --model "$root/tests/published/$name" --weights synthetic:1 \
        --layers "$depth" --devices "$device" --precision bf16 --num-sequences 16 --sequence-length 2048 | tee "$out/$name.txt"
}

devices() {
    "$worker" devices
    # Without it, all further parts would fail.
    "$worker" devices --json | grep -q "\"$device\""
}

part "devices" devices
part "every fixture in f32" "$python" "$root/tests/oracle.py" goldens "$worker" --devices "$device"
part "every fixture in bf16" "$python" "$root/tests/oracle.py" goldens "$worker" --devices "$device" --precision bf16
part "stored bytes to values" "$worker" bench decode --device "$device"
part "both forms of attention" "$worker" bench attention --device "$device"
part "OLMoE" width OLMoE-1B-7B-0125 16
part "Qwen3-30B" width Qwen3-30B-A3B 8
part "gpt-oss-120b" width gpt-oss-120b 6
part "GLM-4.5-Air" width GLM-4.5-Air 6
part "DeepSeek-V3" width DeepSeek-V3-0324 5
# DeltaNets beside attention with heads of 256, DeltaNets whose channels decay, and Mamba.
part "Qwen3-Next" width Qwen3-Next-80B-A3B-Instruct 4
part "Kimi-Linear" width Kimi-Linear-48B-A3B-Instruct 4
part "Nemotron-3-Nano" width NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 6
echo
[ $failed -eq 0 ] && echo "all parts passed; the tables are in $out"
exit $failed
