#!/usr/bin/env bash
# Prints which of its modules each module of both programs uses, and fails where they form a cycle.
# tests/modules.allowed lists the uses that close one today: they are left out, none may be added,
# and one that is gone has to leave the list. Reads text only; tests are left out.
#     tests/modules.sh
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."

# Lines "module module": the first names the second as `crate::second`, or in `use crate::{..}`.
uses() {
    local files
    mapfile -t files < <(find "$1/src" -name '*.rs' ! -path '*/tests/*' ! -name tests.rs \
        ! -path '*/deploy/fake.rs' ! -path '*/deploy/schedules.rs' | sort)
    awk '
        FNR == 1 { test = marked = group = 0; split(FILENAME, part, "/src/"); from = part[2]; sub(/[\/.].*/, "", from) }
        # A module of tests stands last in its file.
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
            if (match($0, /use crate::\{[^}]*/)) {
                list = substr($0, RSTART + 12, RLENGTH - 12)
                gsub(/::[A-Za-z_0-9:]*/, "", list)
                n = split(list, names, /[ ,]+/)
                for (i = 1; i <= n; i++) if (names[i] ~ /^[a-z_0-9]+$/ && names[i] != from) print from, names[i]
            }
        }' "${files[@]}" | sort -u
}

failed=0
for program in controller worker; do
    printf '\n%s\n' "$program"
    all=$(uses "$program" | grep -vE '^(lib|main) ')
    echo "$all" | awk '$1 != last { if (NR > 1) print ""; printf "    %s ->", $1; last = $1 } { printf " %s", $2 } END { print "" }'
    allowed=$(sed -n "s/^$program //p" tests/modules.allowed)
    gone=$(comm -13 <(echo "$all") <(echo "$allowed" | sort | sed '/^$/d'))
    [ -z "$gone" ] || { echo "no longer used, so remove from tests/modules.allowed: $gone" >&2; failed=1; }
    if ! cycles=$(comm -23 <(echo "$all") <(echo "$allowed" | sort) | tsort 2>&1 >/dev/null); then
        echo "$program: its modules use each other in a circle; move what both need into a third:" >&2
        echo "$cycles" >&2
        failed=1
    fi
done
exit "$failed"
