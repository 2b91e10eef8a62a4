#!/usr/bin/env bash
# Prints which rooms each room of both programs uses, the lowest first, and fails where they form a
# circle. A room is a module at the top of a program, with its folder. Reads text only. Tests are
# left out.
#     tests/modules.sh
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."

# Lines "room room": the first names the second as `crate::second`, or in `use crate::{..}`.
uses() {
    local files
    mapfile -t files < <(find "$1/src" -name '*.rs' ! -path '*/tests/*' ! -name tests.rs | sort)
    awk '
        FNR == 1 { test = marked = 0; split(FILENAME, part, "/src/"); from = part[2]; sub(/[\/.].*/, "", from) }
        # The module of tests is the last in its file.
        /^#\[cfg\(test\)\]/ { marked = 1; next }
        marked && /^(pub(\([a-z]+\))? )?mod [a-z_0-9]+ \{/ { test = 1 }
        !/^#/ { marked = 0 }
        test { next }
        { sub(/\/\/.*/, "") }
        {
            line = $0
            while (match(line, /crate::[a-z_0-9]+/)) {
                to = substr(line, RSTART + 7, RLENGTH - 7)
                if (to != from) print from, to
                line = substr(line, RSTART + RLENGTH)
            }
            if (match($0, /use crate::\{/)) {
                list = substr($0, RSTART + RLENGTH)
                while (list !~ /;/ && (getline line) > 0) list = list line
                while (gsub(/\{[^{}]*\}/, "", list)) {}
                gsub(/::[A-Za-z_0-9:]*/, "", list)
                n = split(list, names, /[ ,}]+/)
                for (i = 1; i <= n; i++) if (names[i] ~ /^[a-z_0-9]+$/ && names[i] != from) print from, names[i]
            }
        }' "${files[@]}" | sort -u
}

failed=0
for program in controller worker; do
    printf '\n%s\n' "$program"
    all=$(uses "$program" | grep -vE '^(lib|main) ')
    if ! order=$(echo "$all" | tsort 2>/dev/null | tac); then
        echo "$program: its rooms use each other in a circle; move what both need into a lower one:" >&2
        { echo "$all" | tsort 2>&1 >/dev/null || true; } | sed 's/^tsort: -: .*/    circle:/; s/^tsort: /        /' >&2
        failed=1
    fi
    awk 'NR == FNR { uses[$1] = uses[$1] " " $2; next } { print "    " $1 ($1 in uses ? " ->" uses[$1] : "") }' \
        <(echo "$all") <(echo "$order")
done
exit "$failed"
