#!/bin/sh
# Runs the real worker, then alters its files as a hostile host would.
[ "$1" = run ] || exec 'WORKER' "$@"
'WORKER' "$@"
code=$?
cd "$4" || exit 1
# entry NAME FILE: a manifest line for NAME with the size and hash of FILE.
entry() {
  printf '{"name":"%s","bytes":%s,"sha256":"%s"}' "$1" "$(($(wc -c < "$2")))" "$(sha256sum < "$2" | cut -c 1-64)"
}
# manifest ENTRY...: a manifest of the current files and of these entries.
manifest() {
  lines=
  for name in $(grep -o '"name": *"[^"]*"' manifest.json | cut -d '"' -f 4); do lines="$lines$(entry "$name" "$name"),"; done
  for more; do lines="$lines$more,"; done
  printf '{"schema":1,"outcome":"complete","files":[%s]}' "${lines%,}" > .manifest
  mv .manifest manifest.json
}
zeros=0000000000000000000000000000000000000000000000000000000000000000
ATTACK
exit $code
