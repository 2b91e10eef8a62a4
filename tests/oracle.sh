#!/usr/bin/env bash
# Compares the worker, and `outliers compare` over its runs, with Hugging Face transformers: every
# family, three seeds, two sizes, odd shapes, several containers.
#
#   tests/oracle.sh ORACLE_FOLDER [PYTHON] [options of `oracle.py check`]
#   tests/oracle.sh ORACLE_FOLDER PYTHON keys [options of `oracle.py keys`]
#
# `keys` first compares the worker's data on configuration classes with transformers'. It then tries
# every key of every family's config.json: left out, null, and as transformers 5 saves it. The
# result must equal that of transformers, or be a refusal that names the key.
#
# ORACLE_FOLDER holds make_model.py, golden.py and outliers_ref.py; PYTHON has transformers, torch
# and numpy.
set -euo pipefail
oracle=$(realpath "${1:?usage: oracle.sh ORACLE_FOLDER [PYTHON] [--families F ..] [--seeds N ..] [--sizes S ..]}")
python=$(realpath -s "${2:-$(command -v python3)}")
here=$(cd "$(dirname "$0")" && pwd)
(cd "$here/.." && cargo build --workspace --bins --quiet)
programs="${CARGO_TARGET_DIR:-$here/../target}/debug"
if [ "${3:-}" = keys ]; then
    "$python" "$here/oracle.py" classes "$oracle" --check
    exec "$python" "$here/oracle.py" keys "$oracle" "$programs/outliers-worker" "${@:4}"
fi
exec "$python" "$here/oracle.py" check "$oracle" "$programs/outliers-worker" "$programs/outliers" "${@:3}"
