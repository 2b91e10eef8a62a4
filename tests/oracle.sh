#!/usr/bin/env bash
# Compares the worker with Hugging Face transformers: every family, three seeds, two sizes, odd shapes, several containers.
#
#   tests/oracle.sh ORACLE_FOLDER [PYTHON] [options of `oracle.py check`]
#
# ORACLE_FOLDER holds make_model.py, golden.py and outliers_ref.py; PYTHON has transformers, torch and numpy.
set -euo pipefail
oracle=$(realpath "${1:?usage: oracle.sh ORACLE_FOLDER [PYTHON] [--families F ..] [--seeds N ..] [--sizes S ..]}")
python=$(realpath -s "${2:-$(command -v python3)}")
here=$(cd "$(dirname "$0")" && pwd)
(cd "$here/.." && cargo build --workspace --bins --quiet)
worker="${CARGO_TARGET_DIR:-$here/../target}/debug/outliers-worker"
exec "$python" "$here/oracle.py" check "$oracle" "$worker" "${@:3}"
