#!/usr/bin/env bash
# Kills the real controller at N points of a deploy to a fake cloud, and runs the same command
# again. The cloud's list has an odd entry, and the cloud refuses to end anything at first. The
# amount paid must not exceed the agreed amount.
#     tests/kills.sh 200
# The same for a deploy to a cluster, whose results `outliers attach` saves. One intent may make at
# most one job, and nothing may be left in the queue or in scratch.
#     tests/kills.sh 50 slurm
set -euo pipefail
cd "$(dirname "$0")/.."
OUTLIERS_KILLS=${1:-200} exec cargo test --locked --workspace --test outliers -- "${2:-clouds}::kills" --nocapture
