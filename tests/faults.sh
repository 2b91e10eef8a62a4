#!/usr/bin/env bash
# Builds known bugs into a copy of the program, one at a time, and counts the schedules of faults
# until each is caught. Every bug is a patch in controller/tests/faults, whose first line says what
# it is. One that is not caught fails. Takes a build of the controller for each.
#     tests/faults.sh                  # all
#     tests/faults.sh no-guard         # one
#     tests/faults.sh --check          # only whether each patch still fits the code
set -euo pipefail
cd "$(dirname "$0")/.."
patches=$PWD/controller/tests/faults

if [ "${1:-}" = --check ]; then
    for patch in "$patches"/*.patch; do
        git apply --check -C1 "$patch" || { echo "$patch does not fit the code any more: make it again" >&2; exit 1; }
    done
    exit
fi

names=("$@")
[ ${#names[@]} -gt 0 ] || names=($(cd "$patches" && ls -- *.patch | sed 's/\.patch$//'))
tree=$PWD/target/faults/tree
log=$PWD/target/faults/log
mkdir -p "$tree"
# All files count as new: an earlier build may contain a bug.
git ls-files -z --cached --others --exclude-standard | tar --null -T - --ignore-failed-read -c | tar -x -m -C "$tree"
cd "$tree"
# The copy is not part of the surrounding repository.
export GIT_CEILING_DIRECTORIES=${tree%/tree} CARGO_TARGET_DIR=${tree%/tree}/build
unset OUTLIERS_SEED OUTLIERS_SCHEDULES

build() { cargo test --locked --quiet -p outliers --lib --no-run >"$log" 2>&1 || { cat "$log" >&2; exit 1; }; }
schedules() { cargo test --locked --quiet -p outliers --lib -- deploy::tests::schedules --nocapture >"$log" 2>&1; }

build
schedules || { cat "$log" >&2; echo "the schedules fail without any bug" >&2; exit 1; }
missed=()
printf '%-24s %9s  %s\n' bug schedules "caught by"
for name in "${names[@]}"; do
    git apply -C1 "$patches/$name.patch"
    build
    if schedules; then
        missed+=("$name")
    else
        said=$(grep -Em1 '^schedule [0-9]+ \(seed [0-9]+\): ' "$log") || { cat "$log" >&2; exit 1; }
        number=${said#schedule }
        printf '%-24s %9s  %.100s\n' "$name" "${number%% *}" "${said#*): }"
    fi
    git apply -R -C1 "$patches/$name.patch"
done
[ ${#missed[@]} -eq 0 ] || { echo "not caught: ${missed[*]}" >&2; exit 1; }
