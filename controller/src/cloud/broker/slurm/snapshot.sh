# Prints the leases' folders, then the whole queue of one user, with ended jobs that Slurm still
# lists. ROOT is the folder of all leases. INTERVAL is the time between two calls of squeue in
# seconds, SUBMITTING the longest wait for a submission in seconds. CLUSTER is the name of this
# cluster, if known: others may use the same folder. Leases are printed first, so that the job of a
# folder that was submitted is in the queue that is read later. A job's name may hold anything and
# is printed last: a line after a line break in a name is ignored.
umask 077
# Sets $line to a file's first line without starting a program, since there may be hundreds of
# leases.
first_line() {
    line=''
    if [ -f "$1" ]; then read -r line < "$1"; fi
}
# Sets $line to a number, or to nothing if it is none.
digits() {
    first_line "$1"
    case $line in *[!0-9]* | ????????????????*) line='' ;; esac
}
limited() { if command -v timeout > /dev/null 2>&1; then timeout 20 "$@"; else "$@"; fi; }
squeue_me() { squeue --me --noheader --states=all --format='@job %i|%T|%r|%P|%S|%e|%N|%j'; }
# Everybody's jobs that wait, without names, which may hold anything.
squeue_all() { squeue --noheader --states=PENDING --format='%i|%P|%Q'; }

known='' shared='' of=${CLUSTER:+-$CLUSTER}
if cd "$ROOT" 2> /dev/null; then
    shared=yes
    for lease in outliers-*/; do
        lease=${lease%/}
        [ -d "$lease" ] || continue
        case $lease in *[!A-Za-z0-9-]*) continue ;; esac
        first_line "$lease/cluster"
        if [ -n "$line" ] && [ -n "$CLUSTER" ] && [ "$line" != "$CLUSTER" ]; then continue; fi
        stage=waiting
        for go in "$lease"/outliers/*/go; do [ -f "$go" ] && stage=launched; done
        first_line "$lease/stage.failed"
        [ -n "$line" ] && printf '@unstaged %s|%s\n' "$lease" "$line"
        digits "$lease/submitting"
        [ -n "$line" ] && [ $(($(date +%s) - line)) -lt "$SUBMITTING" ] && stage=submitting
        digits "$lease/job.id"
        [ -n "$line" ] && [ "$stage" != submitting ] && known="$known $line:$lease"
        first_line "$lease/times"
        if [ -n "$line" ]; then
            times=$line
            digits "$lease/alive"
            printf '@time %s|%s|%s\n' "$lease" "$times" "$line"
        fi
        digits "$lease/ends"
        ends=$line
        first_line "$lease/lease"
        printf '@lease %s|%s|%s|%s\n' "$lease" "$stage" "$ends" "$line"
    done
fi

# Whoever uses this folder asks a cluster's queue once per interval, all together: .asked says when
# it was asked last, and .queue-<that> what came. An answer from before a change (.changed) is none.
due() {
    digits ".asked$of"
    asked=$line
    digits .changed
    changed=$line
    age=$(($(date +%s) - ${asked:-0}))
    [ $age -ge "$INTERVAL" ] || [ $age -lt 0 ]
}
# The places of our jobs that wait among all that wait in their partitions, highest priority first,
# and the oldest first of equal ones. $queue has our jobs. A cluster may hide the jobs of others.
places() {
    if limited scontrol show config 2> /dev/null | grep -q '^PrivateData *=.*jobs'; then
        echo '@places hidden'
        return
    fi
    waiting=$(squeue_all) || return 1
    { printf '%s\n' "$queue"; echo; printf '%s\n' "$waiting"; } | awk -F '|' '
        !all && $0 == "" { all = 1; next }
        !all { if ($1 ~ /^@job / && $2 == "PENDING" && $NF ~ /^outliers-/) { sub(/^@job /, "", $1); ours[$1] = 1 }; next }
        { id[++count] = $1; partitions[count] = "," $2 ","; priority[count] = $3 + 0; at[$1] = count }
        END {
            for (job in ours) {
                if (!(job in at)) continue
                me = at[job]; place = 1; of = 0
                for (i = 1; i <= count; i++) {
                    if (index(partitions[i], partitions[me]) == 0) continue
                    of++
                    if (priority[i] > priority[me] || (priority[i] == priority[me] && id[i] + 0 < id[me] + 0)) place++
                }
                print "@place " job "|" place "|" of
            }
        }'
}
# Whether a job of ours waits by the answer before this one, which still holds, and their places
# are older than a minute: then they are what is asked for this time.
places_are_due() {
    [ "$before" -gt "${changed:-0}" ] && [ -f ".queue$of-$before" ] || return 1
    queue=$(cat ".queue$of-$before") || return 1
    printf '%s\n' "$queue" | grep -q '|PENDING|.*|outliers-' || return 1
    digits ".placed$of"
    [ $(($(date +%s) - ${line:-0})) -ge 60 ]
}
# Only whoever made the folder .asking may ask: one question, for our jobs or for their places.
ask_for_all() {
    due || return 1
    before=${asked:-0}
    asked=$(date +%s)
    echo "$asked" > ".asked$of"
    if places_are_due; then
        echo "$asked" > ".placed$of"
        { places > ".part$of-$asked" && mv ".part$of-$asked" ".places$of"; } 2> /dev/null
    else
        queue=$(squeue_me) || { rmdir .asking; exit 1; }
    fi
    rm -f ".queue$of"-*
    { printf '%s\n' "$queue" > ".part$of-$asked" && mv ".part$of-$asked" ".queue$of-$asked"; } 2> /dev/null
    return 0
}
# Neither a clock change nor a full disk prevents the call.
i=0 most=$((INTERVAL + 20)) queue=''
while [ -n "$shared" ] && [ $i -lt $most ]; do
    if due; then
        if mkdir .asking 2> /dev/null; then
            if ask_for_all; then got=yes; else got=''; fi
            rmdir .asking
            if [ -n "$got" ]; then break; fi
        elif [ ! -d .asking ]; then
            # The folder is not writable.
            i=$most
            break
        elif [ -n "$(find .asking -prune -mmin +1 2> /dev/null)" ]; then
            # The process that was calling squeue has died.
            rmdir .asking 2> /dev/null
        fi
    elif [ "${asked:-0}" -gt "${changed:-0}" ] && [ -f ".queue$of-$asked" ]; then
        queue=$(cat ".queue$of-$asked") && break
    fi
    i=$((i + 1))
    sleep 1
done
if [ -z "$shared" ] || [ $i -ge $most ]; then queue=$(squeue_me) || exit 1; fi
printf '%s\n' "$queue"
if [ -n "$shared" ] && [ -f ".places$of" ]; then cat ".places$of"; fi

# Prints the final state of a job that squeue no longer shows: from accounting, or from Slurm's
# controller without accounting. It is stored, so that it is queried once.
ended() {
    format=State,Start,End,JobName
    word=$(limited sacct --noheader --parsable2 --allocations --jobs="$1" --format="$format" 2> /dev/null |
        sed -n "s/^\([A-Z_]*\)[^|]*|\([^|]*\)|\([^|]*\)|$2\$/\1 \2 \3/p" | tail -n 1)
    [ -n "$word" ] || word=$(limited scontrol --oneliner show job "$1" 2> /dev/null |
        sed -n "s/^JobId=.* JobName=$2 .* JobState=\([A-Z_]*\) .* StartTime=\([^ ]*\) EndTime=\([^ ]*\) .*/\1 \2 \3/p" |
        tail -n 1)
    case ${word%% *} in '' | PENDING | RUNNING | REQUEUED | RESIZING | SUSPENDED | COMPLETING) return 1 ;; esac
    echo "$word" > "$2/over"
} 2> /dev/null
# Prints the jobs of $known that the queue lacks, in one pass, since there may be hundreds of both.
missing() {
    { printf '%s\n' $known; echo; printf '%s\n' "$queue"; } | awk -F '|' '
        !queue && $0 == "" { queue = 1; next }
        !queue { known[++count] = $0; next }
        { jobs[$NF] = 1 }
        END { for (i = 1; i <= count; i++) { split(known[i], one, ":"); if (!(one[2] in jobs)) print known[i] } }'
}
asked=0
for one in $(missing); do
    id=${one%%:*} lease=${one#*:}
    if [ ! -s "$lease/over" ] && [ $asked -lt 20 ]; then
        asked=$((asked + 1))
        ended "$id" "$lease"
    fi
    first_line "$lease/over"
    printf '@past %s|%s\n' "$lease" "$line"
done
echo '@end '
