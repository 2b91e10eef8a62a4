#!/usr/bin/env bash
# Kills the real controller at N points of a deploy to a fake cloud, and runs the same command
# again. The cloud's list has an odd entry, and the cloud refuses to end anything at first. What is
# paid must not exceed what was agreed.
#     tests/kills.sh 200
# The same of a deploy to a cluster, whose results `outliers attach` brings home: at most one job
# may come of one intent, and nothing may be left in the queue or in scratch.
#     tests/kills.sh 50 slurm
set -euo pipefail
cd "$(dirname "$0")/.."
OUTLIERS_KILLS=${1:-200} exec cargo test --locked --workspace --test outliers -- "${2:-clouds}::kills" --nocapture
