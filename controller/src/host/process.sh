# What every script on a host needs: is the worker there, and how does it end. Runs in the run's folder.

# A pid alone proves nothing: it may belong to another process by now (so its start time is kept beside it), and a killed
# wrapper stays a zombie where the container's first process does not reap.
started() {
    if [ -r "/proc/$1/stat" ]; then sed 's/.*) //' "/proc/$1/stat" 2> /dev/null | cut -d ' ' -f 20
    else ps -o lstart= -p "$1" 2> /dev/null; fi
}

# alive FILE: the process whose number and start time stand in FILE runs; its number is in $p.
alive() {
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
    if [ ! -f exit_code ]; then
        if [ ! -f worker.pid ]; then echo '@state none'; return; fi
        if alive worker.pid; then echo "@state running $p"; return; fi
    fi
    # It may have ended between the two looks.
    echo "@state ended $(head -c 20 exit_code 2> /dev/null | tr -cd 0-9)"
}

# Ends the worker and all it started: asks, waits 15 seconds, kills. Fails if it is still there.
stop_worker() {
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

# Seconds of a clock that nobody sets.
ticks() {
    if [ -r /proc/uptime ]; then cut -d . -f 1 /proc/uptime; else date +%s; fi
}
