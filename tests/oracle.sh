#!/usr/bin/env bash
# Compares the worker, and what `outliers compare` says of its runs, with Hugging Face transformers: every family, three seeds, two sizes,
# odd shapes, several containers.
#
#   tests/oracle.sh ORACLE_FOLDER [PYTHON] [options of `oracle.py check`]
#
# ORACLE_FOLDER holds make_model.py, golden.py and outliers_ref.py; PYTHON has transformers, torch and numpy.
set -euo pipefail
oracle=$(realpath "${1:?usage: oracle.sh ORACLE_FOLDER [PYTHON] [--families F ..] [--seeds N ..] [--sizes S ..]}")
python=$(realpath -s "${2:-$(command -v python3)}")
here=$(cd "$(dirname "$0")" && pwd)
(cd "$here/.." && cargo build --workspace --bins --quiet)
programs="${CARGO_TARGET_DIR:-$here/../target}/debug"
exec "$python" "$here/oracle.py" check "$oracle" "$programs/outliers-worker" "$programs/outliers" "${@:3}"
