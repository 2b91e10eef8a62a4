#!/usr/bin/env bash
# Plays random schedules of faults against the loop that drives a run: many, or one again.
#     tests/schedules.sh --schedules 100000 --seed 1
#     tests/schedules.sh --schedules 5000 --seed random
set -euo pipefail
cd "$(dirname "$0")/.."
export OUTLIERS_SEED=$((RANDOM << 15 | RANDOM))
while [ $# -gt 0 ]; do
    case $1 in
        --schedules) export OUTLIERS_SCHEDULES=$2 ;;
        --seed) export OUTLIERS_SEED=$2 ;;
        *) echo "usage: tests/schedules.sh [--schedules N] [--seed S|random]" >&2; exit 2 ;;
    esac
    shift 2
done
exec cargo test --release --locked -p outliers --lib -- deploy::tests::schedules --nocapture
