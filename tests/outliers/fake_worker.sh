#!/bin/sh
# A fake outliers-worker. The job's model path names the scenario.
if [ "$1" = version ]; then
  echo '{"version":"VERSION","schema":1,"target":"any","cuda":false,"architectures":["llama"]}'
  exit 0
fi
job=$2 out=$4
scenario=$(sed -n 's/.*"path": *"\([a-z-]*\)".*/\1/p' "$job")
echo start >> "$out/starts"
say() {
  printf '{"schema":1,"at_ms":1,"phase":"%s","layer":%s,"layers":4,"bytes_read":1,"bytes_total":2,"tokens_per_second":1.0}\n' \
    "$1" "$2" >> "$out/progress.jsonl"
}
entry() {
  printf '{"name":"%s","bytes":%s,"sha256":"%s"}' "$1" "$(($(wc -c < "$out/$2")))" "$(sha256sum < "$out/$2" | cut -c 1-64)"
}
manifest() {
  printf '{"schema":1,"outcome":"complete","files":[%s]}' "$1" > "$out/manifest.json.part"
  mv "$out/manifest.json.part" "$out/manifest.json"
}
results() {
  printf '{"token":"%s"}' "$HF_TOKEN" > "$out/results.json"
  printf '{}' > "$out/metadata.json"
}
finish() {
  results
  manifest "$(entry results.json results.json),$(entry metadata.json metadata.json)"
  say done 4
}
say starting 0
echo "the worker says hello"
case $scenario in
  quick) for i in 1 2 3 4; do say layers $i; done; finish ;;
  slow) for i in 1 2 3 4; do sleep 1; say layers $i; done; finish ;;
  endless)
    say layers 1
    head -c 1500000 /dev/zero | tr '\0' x >> "$out/progress.jsonl"
    echo >> "$out/progress.jsonl"
    printf 'torn {\n' >> "$out/progress.jsonl"
    printf 'log with \033[31mcolour\033[0m and \033]0;title\007bell\n' >&2
    finish ;;
  fails) echo "no such model" >&2; say failed 0; exit 3 ;;
  hangs) exec sleep 600 ;;
  stubborn) trap '' TERM; while :; do sleep 1; done ;;
  huge-log) head -c 40000000 /dev/zero | tr '\0' 'l'; echo; echo last; finish ;;
  huge-progress)
    dd if=/dev/zero of="$out/progress.jsonl" bs=1 count=0 seek=2000000000 2>/dev/null
    echo >> "$out/progress.jsonl"
    finish ;;
  vast | petabyte)
    size=53687091200; [ "$scenario" = petabyte ] && size=1125899906842624
    results
    vast=$(printf '{"name":"vast.json","bytes":%s,"sha256":"%064d"}' $size 0)
    manifest "$(entry results.json results.json),$vast" ;;
  stranger) results; manifest "$(entry another.json results.json)" ;;
  climbs) results; manifest "$(entry ../results.json results.json)" ;;
  absolute) results; manifest "$(entry /etc/passwd results.json)" ;;
  nested) results; manifest "$(entry a/b results.json)" ;;
  hidden) results; manifest "$(entry .bashrc results.json)" ;;
  twice) results; manifest "$(entry results.json results.json),$(entry Results.json results.json)" ;;
  linked) results; ln -s /etc/passwd "$out/linked.json"; manifest "$(entry linked.json linked.json)" ;;
  missing) results; manifest "$(entry missing.json results.json)" ;;
  changed) results; m=$(entry results.json results.json); printf '{"tokem":""}' > "$out/results.json"; manifest "$m" ;;
  longer) results; m=$(entry results.json results.json); echo more >> "$out/results.json"; manifest "$m" ;;
  pipe) results; mkfifo "$out/pipe.json"; m=$(entry pipe.json results.json); manifest "$m" ;;
  nonsense) results; printf '[1,2' > "$out/manifest.json" ;;
  future) results; printf '{"schema":99,"outcome":"complete","files":[]}' > "$out/manifest.json" ;;
  *) echo "unknown scenario $scenario" >&2; exit 9 ;;
esac
