# Ends the run and its instance when no controller connects any more.
# Argument: the run's folder. The script ends when the folder is removed.
cd "$1" || exit 125
umask 077

say() {
    echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) guard: $1" | tee -a guard.log >> worker.log
}

{ echo $$; started $$; } > .guard.$$
until ln .guard.$$ guard.pid 2> /dev/null; do
    if alive guard.pid || [ ! -f guard.terms ]; then rm -f .guard.$$; exit 0; fi
    rm -f guard.pid
done
rm -f .guard.$$

# Of two guards started at once, the one whose pid is in the file continues.
on_duty() {
    [ -f guard.terms ] && [ "$(sed -n 1p guard.pid 2> /dev/null)" = $$ ]
}

ended='' why=''
while [ -z "$why" ]; do
    on_duty || exit 0
    # Sets ends, lease, unclaimed and pause in seconds; 0 means never.
    . ./guard.terms
    now=$(ticks)
    heard=$(cat guard.lease 2> /dev/null)
    case $heard in '' | *[!0-9]*) heard=$now ;; esac
    since=$heard
    if [ -f exit_code ]; then
        : "${ended:=$now}"
        [ "$ended" -gt "$since" ] && since=$ended
    else
        ended=''
    fi
    if [ "$now" -ge "$ends" ]; then
        why='the time limit of the run is reached'
    elif [ -n "$ended" ] && [ "$unclaimed" -gt 0 ] && [ $((now - since)) -ge "$unclaimed" ]; then
        why="the worker has ended, and nobody came for its files in $unclaimed s"
    elif [ "$lease" -gt 0 ] && [ $((now - heard)) -ge "$lease" ]; then
        why="nobody looked after this run for $lease s"
    else
        [ $((ends - now)) -lt "$pause" ] && pause=$((ends - now))
        sleep "$pause"
    fi
done

say "$why: the worker is stopped"
stop_worker
if [ ! -f guard.end.sh ]; then
    say 'this cloud gives an instance no means to end itself: it bills until `outliers reap` or its account ends it'
    exit 0
fi
while on_duty; do
    if sh ./guard.end.sh >> guard.log 2>&1; then say 'the instance is told to end'
    else say 'the instance could not be told to end; once more in a minute'; fi
    sleep 60
done
