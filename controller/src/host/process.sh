# Functions for all scripts on a host: whether the worker runs, and how to end it.

# A pid is compared with the start time stored with it, since another process may have got the
# number. A killed wrapper remains a zombie if the container's first process does not reap it.
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

# alive FILE: succeeds if the process in FILE (pid and start time) runs; sets $p to its pid.
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
    # Listing the folder refreshes the cache of a network file system, which remembers that a file
    # was missing.
    if in_job; then
        ls > /dev/null
        if [ ! -f go ] && [ ! -f exit_code ]; then echo '@state none'; return; fi
        if alive worker.pid; then echo '@state running'; return; fi
    elif [ ! -f exit_code ]; then
        if [ ! -f worker.pid ]; then echo '@state none'; return; fi
        if alive worker.pid; then echo "@state running $p"; return; fi
    fi
    # The worker may have ended between the two checks.
    echo "@state ended $(head -c 20 exit_code 2> /dev/null | tr -cd 0-9)"
}

# Ends the worker and its children: SIGTERM, 15 seconds, SIGKILL. Fails if the worker still runs.
stop_worker() {
    if in_job; then stop_job; return; fi
    [ -f worker.pid ] || return 0
    if alive worker.pid; then
        # The wrapper leads its own process group.
        kill -TERM -"$p" 2> /dev/null || kill -TERM "$p" 2> /dev/null
        end=$(($(ticks) + 15))
        while alive worker.pid && [ "$(ticks)" -lt "$end" ]; do sleep 1; done
        kill -KILL -"$p" 2> /dev/null
        alive worker.pid && kill -KILL "$p" 2> /dev/null
    elif [ ! -f exit_code ]; then
        # Without its wrapper the group is still this run's if its number is not that of a new
        # process.
        case $p in '' | *[!0-9]*) return 0 ;; esac
        now=$(started "$p")
        if [ -z "$now" ] || [ "$now" = "$(sed -n 2p worker.pid)" ]; then kill -KILL -"$p" 2> /dev/null; fi
    fi
    end=$(($(ticks) + 5))
    while alive worker.pid && [ "$(ticks)" -lt "$end" ]; do sleep 1; done
    ! alive worker.pid
}

# The job's script ends the worker when it sees the file. A job that waits in the queue again sees
# nothing.
stop_job() {
    alive worker.pid || return 0
    : > stop
    i=0
    while alive worker.pid && [ $i -lt 20 ]; do i=$((i + 1)); sleep 1; ls > /dev/null; done
    if alive worker.pid; then $outliers_cancel && sleep 5; fi
}

# Lets the worker start. On a cluster the job's script starts it when it sees the file.
start_worker() {
    if in_job; then
        if [ "$outliers_job" = over ]; then echo "its job is over: $outliers_job_says" >&2; return 1; fi
        if job_is_ending; then echo 'its job is being ended' >&2; return 1; fi
        : >> worker.log
        : > go
    elif command -v setsid > /dev/null 2>&1; then setsid sh ./launch.sh < /dev/null >> worker.log 2>&1 &
    else set -m; nohup sh ./launch.sh < /dev/null >> worker.log 2>&1 & fi
}

# Seconds of a monotonic clock.
ticks() {
    if [ -r /proc/uptime ]; then cut -d . -f 1 /proc/uptime; else date +%s; fi
}
