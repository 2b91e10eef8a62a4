# What every script on a host needs: is the worker there, and how does it end. Runs in the run's folder.

# A pid alone proves nothing: it may belong to another process by now (so its start time is kept beside it), and a killed
# wrapper stays a zombie where the container's first process does not reap.
started() {
    if [ -r "/proc/$1/stat" ]; then sed 's/.*) //' "/proc/$1/stat" 2> /dev/null | cut -d ' ' -f 20
    else ps -o lstart= -p "$1" 2> /dev/null; fi
}

# On a cluster the worker runs in a job, on another machine than most of these scripts. There
# $outliers_job is `open` while the job waits or runs, `ending` while Slurm ends it and `over`
# afterwards, $outliers_job_says is Slurm's word on it, and $outliers_cancel ends it.
in_job() { [ -n "${outliers_job:-}" ]; }
# The job's script hears of its end before the queue shows it.
job_is_ending() { [ "$outliers_job" = ending ] || { [ "$outliers_job" = open ] && [ -f ending ]; }; }
# What Slurm ends did not die, and nothing is started beside it: how the job ended, which decides
# what comes next, is known when it is over.
is_cut_off() { job_is_ending && [ ! -f manifest.json ]; }

# alive FILE: the process whose number and start time stand in FILE runs; its number is in $p.
alive() {
    if in_job; then [ "$outliers_job" != over ] && [ -f go ] && { [ ! -f exit_code ] || is_cut_off; }; return; fi
    p=$(sed -n 1p "$1" 2> /dev/null)
    case $p in '' | *[!0-9]*) return 1 ;; esac
    kill -0 "$p" 2> /dev/null || return 1
    if [ -r "/proc/$p/stat" ]; then s=$(sed 's/.*) //' "/proc/$p/stat" 2> /dev/null)
    else s=$(ps -o stat= -p "$p" 2> /dev/null); fi
    case $s in Z* | X* | '') return 1 ;; esac
    [ "$(started "$p")" = "$(sed -n 2p "$1")" ]
}

# Prints `@state none`, `@state running PID`, `@state ended STATUS` or `@state ended `.
state() {
    # A listing brings what the other machine wrote: network file systems remember that a file was
    # not there.
    if in_job; then
        ls > /dev/null
        if [ ! -f go ] && [ ! -f exit_code ]; then echo '@state none'; return; fi
        if alive worker.pid; then echo '@state running'; return; fi
    elif [ ! -f exit_code ]; then
        if [ ! -f worker.pid ]; then echo '@state none'; return; fi
        if alive worker.pid; then echo "@state running $p"; return; fi
    fi
    # It may have ended between the two looks.
    echo "@state ended $(head -c 20 exit_code 2> /dev/null | tr -cd 0-9)"
}

# Ends the worker and all it started: asks, waits 15 seconds, kills. Fails if it is still there.
stop_worker() {
    if in_job; then stop_job; return; fi
    [ -f worker.pid ] || return 0
    if alive worker.pid; then
        # The wrapper leads a process group of its own.
        kill -TERM -"$p" 2> /dev/null || kill -TERM "$p" 2> /dev/null
        end=$(($(ticks) + 15))
        while alive worker.pid && [ "$(ticks)" -lt "$end" ]; do sleep 1; done
        kill -KILL -"$p" 2> /dev/null
        alive worker.pid && kill -KILL "$p" 2> /dev/null
    elif [ ! -f exit_code ]; then
        # Without its wrapper the group is still ours as long as its number is no other process.
        case $p in '' | *[!0-9]*) return 0 ;; esac
        now=$(started "$p")
        if [ -z "$now" ] || [ "$now" = "$(sed -n 2p worker.pid)" ]; then kill -KILL -"$p" 2> /dev/null; fi
    fi
    end=$(($(ticks) + 5))
    while alive worker.pid && [ "$(ticks)" -lt "$end" ]; do sleep 1; done
    ! alive worker.pid
}

# The job's own script ends the worker when it sees the file; one that waits in the queue again
# sees nothing.
stop_job() {
    alive worker.pid || return 0
    : > stop
    i=0
    while alive worker.pid && [ $i -lt 20 ]; do i=$((i + 1)); sleep 1; ls > /dev/null; done
    if alive worker.pid; then $outliers_cancel && sleep 5; fi
}

# Lets the worker start; on a cluster the job's script does when it sees the file.
start_worker() {
    if in_job; then
        if [ "$outliers_job" = over ]; then echo "its job is over: $outliers_job_says" >&2; return 1; fi
        if job_is_ending; then echo 'its job is being ended' >&2; return 1; fi
        : >> worker.log
        : > go
    elif command -v setsid > /dev/null 2>&1; then setsid sh ./launch.sh < /dev/null >> worker.log 2>&1 &
    else set -m; nohup sh ./launch.sh < /dev/null >> worker.log 2>&1 & fi
}

# Seconds of a clock that nobody sets.
ticks() {
    if [ -r /proc/uptime ]; then cut -d . -f 1 /proc/uptime; else date +%s; fi
}
