#!/usr/bin/env bash
# Kills the real controller at N points of a deploy to a fake cloud, and runs the same command
# again. The cloud's list has an odd entry, and the cloud refuses to end anything at first. What is
# paid must not exceed what was agreed.
#     tests/kills.sh 200
set -euo pipefail
cd "$(dirname "$0")/.."
OUTLIERS_KILLS=${1:-200} exec cargo test --locked --workspace --test outliers -- clouds::kills --nocapture
