#!/usr/bin/env bash
# Makes the release archive for Linux on x86-64: both programs, completions, manual pages,
# licences. Its worker is the one for instances (worker/build.sh --cuda), which also runs here.
#
#     ./release.sh [--from FOLDER] [--output FOLDER]      default: a new build, into target/dist
#
# --from takes the programs from a folder instead: outliers, and outliers-worker-portable or else
# outliers-worker.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")"

build=${CARGO_TARGET_DIR:-target}
from='' output=$build/dist
while [ $# -gt 0 ]; do
    case $1 in
        --from) from=$(cd "$here" && realpath "${2:?--from needs a folder}"); shift ;;
        --output) output=$(cd "$here" && realpath -m "${2:?--output needs a folder}"); shift ;;
        *) echo "usage: ./release.sh [--from FOLDER] [--output FOLDER]" >&2; exit 2 ;;
    esac
    shift
done
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "the archive is for Linux on x86_64, and made there; this is $(uname -sm)" >&2
    exit 1
fi

if [ -z "$from" ]; then
    cargo build --release --locked --package outliers
    worker/build.sh --cuda
    from=$build/release
fi
worker=$from/outliers-worker-portable
[ -e "$worker" ] || worker=$from/outliers-worker

read -r _ version _ < <("$from/outliers" --version)
name=outliers-$version-x86_64-linux
mkdir -p "$output"
place=$output/$name
rm -rf "$place"
mkdir -p "$place/completions"
install -m 755 "$from/outliers" "$place/outliers"
install -m 755 "$worker" "$place/outliers-worker-portable"
# The name under which the controller looks for this machine's worker.
ln -s outliers-worker-portable "$place/outliers-worker"
"$place/outliers-worker-portable" version --json > "$place/outliers-worker-portable.json"
for shell in bash zsh fish; do
    "$place/outliers" completions "$shell" > "$place/completions/outliers.$shell"
done
"$place/outliers" --quiet man "$place/man/man1"
cp LICENSE-APACHE LICENSE-MIT README.md CHANGELOG.md SECURITY.md "$place"

tar -C "$output" -czf "$output/$name.tar.gz.part" "$name"
mv -f "$output/$name.tar.gz.part" "$output/$name.tar.gz"
(cd "$output" && sha256sum "$name.tar.gz" | tee "$name.tar.gz.sha256")
"$place/outliers" --version
