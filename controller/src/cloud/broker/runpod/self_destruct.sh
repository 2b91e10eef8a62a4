# Ends the pod in which it runs, with a key from RunPod that is valid for this pod only.
# The variables are in the environment of the first process. An SSH session may lack them.
of_pod() {
    tr '\0' '\n' < /proc/1/environ 2> /dev/null | sed -n "s/^$1=//p" | head -n 1
}
pod=${RUNPOD_POD_ID:-$(of_pod RUNPOD_POD_ID)}
key=${RUNPOD_API_KEY:-$(of_pod RUNPOD_API_KEY)}
if [ -z "$pod" ] || [ -z "$key" ]; then
    echo 'this is no pod of RunPod, or its key is not there' >&2
    exit 1
fi

by_runpodctl() {
    command -v runpodctl > /dev/null || return 1
    RUNPOD_API_KEY=$key runpodctl pod delete "$pod" || RUNPOD_API_KEY=$key runpodctl remove pod "$pod"
}
# The key is passed on standard input, since arguments are visible to all users.
with_key() {
    printf 'header = "Authorization: Bearer %s"\n' "$key" | curl --config - --silent --fail --max-time 60 "$@"
}
by_rest() {
    with_key --request DELETE "https://api.runpod.io/v2/pods/$pod"
}
by_graphql() {
    order='{"query": "mutation End($input: PodTerminateInput!) { podTerminate(input: $input) }",'
    order="$order \"variables\": {\"input\": {\"podId\": \"$pod\"}}}"
    reply=$(with_key --header 'Content-Type: application/json' --data "$order" https://api.runpod.io/graphql) || return 1
    case $reply in *'"errors"'*) return 1 ;; esac
}

for way in by_runpodctl by_rest by_graphql; do
    if "$way" > /dev/null 2>&1; then
        exit 0
    fi
done
echo 'RunPod did not take the order to end this pod' >&2
exit 1
