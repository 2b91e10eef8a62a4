#!/bin/sh
# The real worker, and then what a hostile host does to its files.
[ "$1" = run ] || exec 'WORKER' "$@"
'WORKER' "$@"
code=$?
cd "$4" || exit 1
# entry NAME FILE: a line of a manifest that says of NAME what is true of FILE.
entry() {
  printf '{"name":"%s","bytes":%s,"sha256":"%s"}' "$1" "$(($(wc -c < "$2")))" "$(sha256sum < "$2" | cut -c 1-64)"
}
# manifest ENTRY...: the same files as they are now, and these.
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
