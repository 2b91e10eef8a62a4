# The batch script of a job: writes the facts about its node, waits until the worker may start, runs
# it, and ends with it. Its working folder is that of the lease, on the file system that login node
# and compute nodes share. RUN is the run's folder in it, LIMIT the job's time limit in seconds, HUB
# the address of the hub.
[ -f lease ] || { echo 'the folder of this job is gone: nothing is done' >&2; exit 1; }
umask 077
# A job that was put back into the queue was asked to end before.
rm -f "$RUN/ending"
OUTLIERS_JOB=$SLURM_JOB_ID
export OUTLIERS_JOB

# Writes a file atomically, since other machines read it.
write() { cat > "$1.part" && mv -f "$1.part" "$1"; }

# Nothing is written into a folder that is being removed.
alive() { [ ! -f lease ] || date +%s | write alive; }
# Seconds of earlier starts of this job, and when the present one began. A start that was cut off
# without a word was last at work as `alive` says, which is renewed every minute.
count_time() {
    ended=0 last='' seen=''
    if [ -f times ]; then read -r ended last < times; fi
    if [ -f alive ]; then read -r seen < alive; fi
    if [ -n "$last" ] && [ "${seen:-0}" -gt "$last" ]; then ended=$((ended + seen - last)); fi
    echo "$ended ${SLURM_JOB_START_TIME:-$(date +%s)}" | write times
    alive
}
count_time
trap alive EXIT

echo "$SLURM_JOB_ID" | write job.id
echo $(($(date +%s) + LIMIT)) | write ends
# Whether this node reaches the hub, if that can be determined.
reaches_hub() {
    if command -v curl > /dev/null 2>&1; then
        curl --silent --output /dev/null --max-time 10 "$HUB"
        case $? in 0) echo yes ;; 5 | 6 | 7 | 28) echo no ;; esac
    elif command -v wget > /dev/null 2>&1; then
        wget --quiet --tries=1 --timeout=10 --spider "$HUB"
        case $? in 0 | 8) echo yes ;; 4) echo no ;; esac
    fi
}
(
    HOME=$PWD
    probe
    echo "@hub $(reaches_hub)"
) 2> /dev/null | write facts

# A requeued job starts here again, and its worker continues from its save point.
rm -f "$RUN/worker.pid"
[ -f "$RUN/manifest.json" ] || rm -f "$RUN/exit_code"

worker='' told=''
# Ends the worker and its children. They are in this script's process group, which Slurm tracks, so
# that no process outlives the job.
end_worker() {
    trap '' TERM
    kill -TERM 0
    trap end_job TERM
}
# No worker is to be started any more.
end_job() {
    told=yes
    echo told 2> /dev/null > "$RUN/ending"
    end_worker
}
# Slurm asks before the time is up, and before it gives the node to another job.
trap end_job TERM

# A listing brings what another machine has written: network file systems remember that a file was
# not there.
looks=0
look() {
    ls "$RUN" > /dev/null 2>&1
    looks=$((looks + 1))
    [ $((looks % 60)) -ne 0 ] || alive
}

while [ -z "$told" ]; do
    look
    [ -f "$RUN/stop" ] && exit 0
    if [ ! -f "$RUN/go" ] || [ ! -f "$RUN/launch.sh" ]; then sleep 1; continue; fi
    sh "$RUN/launch.sh" < /dev/null >> "$RUN/worker.log" 2>&1 &
    worker=$!
    while kill -0 "$worker" 2> /dev/null; do
        if [ -f "$RUN/stop" ]; then end_worker; fi
        sleep 1
        look
    done
    wait "$worker"
    [ -f "$RUN/manifest.json" ] || [ -f "$RUN/stop" ] || [ -n "$told" ] && break
    # A worker that died may be restarted: the controller then removes its exit code.
    i=0
    while [ -f "$RUN/exit_code" ] && [ $i -lt 60 ] && [ -z "$told" ]; do i=$((i + 1)); sleep 1; look; done
    [ -f "$RUN/exit_code" ] && break
    rm -f "$RUN/worker.pid"
done
# If Slurm ended the worker, it did not fail: the job may be requeued, and Slurm reports its
# status.
if [ -n "$told" ] && [ ! -f "$RUN/manifest.json" ]; then
    i=0
    while [ -n "$worker" ] && kill -0 "$worker" 2> /dev/null && [ $i -lt 30 ]; do i=$((i + 1)); sleep 1; done
    rm -f "$RUN/exit_code"
    # The time limit was reached: the worker must not be restarted.
    now=$(date +%s)
    if [ "$now" -ge $(($(cat ends) - 180)) ]; then echo "$now" | write ends; fi
fi
