# The batch script of a staging job: fetches the files in `stage.files` (size in bytes and name per
# line) from BASE into the folder `model`. Its working folder is that of the lease. The run's job
# starts after it has succeeded.
[ -f lease ] || { echo 'the folder of this job is gone: nothing is done' >&2; exit 1; }
umask 077
fail() {
    echo "$1" >&2
    echo "$1" | tr '\n' ' ' > stage.failed
    exit 1
}
size() { if [ -f "$1" ]; then wc -c < "$1" | tr -d ' '; fi; }

rm -f stage.failed
command -v curl > /dev/null 2>&1 || fail 'its node has no curl'
mkdir -p model || fail 'the scratch folder cannot be written'
# The token is not on a command line, which all users of the node can see.
: > .fetch
if [ -s .token ]; then printf 'header = "Authorization: Bearer %s"\n' "$(cat .token)" > .fetch; fi

# A requeued job continues where it was.
while read -r bytes name; do
    file=model/$name
    [ "$(size "$file")" = "$bytes" ] && continue
    if [ "$(size "$file.part")" != "$bytes" ]; then
        why=$(curl --config .fetch --fail --silent --show-error --location --retry 5 --connect-timeout 30 \
            --speed-limit 1000 --speed-time 120 --continue-at - --output "$file.part" "$BASE/$name" 2>&1 < /dev/null) ||
            fail "$name could not be fetched: $why"
    fi
    came=$(size "$file.part")
    if [ "${came:-0}" != "$bytes" ]; then
        rm -f "$file.part"
        fail "$name has ${came:-no} bytes, and $bytes are listed"
    fi
    mv -f "$file.part" "$file" || fail "$name cannot be written"
done < stage.files
rm -f .fetch .token
