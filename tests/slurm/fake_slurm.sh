#!/bin/sh
# Stands in for sbatch, squeue, scancel, sinfo, sacct and scontrol, by the name with which it is
# started. Jobs are folders below $SLURM_STAND_IN/jobs and processes of this machine. A job that
# depends on another starts at a call of squeue after that job has succeeded. The script accepts the
# options that the broker uses and no others. It prints the output of Slurm 22.05.8 (recorded/), or
# of 24.05 if the file `newer` exists (README.md). Other files in $SLURM_STAND_IN cause failures:
#   hold         the next job waits, with this reason, until the file goes
#   lose-reply   the next submission times out, though the job was made
#   refuse       the next submission is refused, with these words
#   busy         every command fails, with these words
#   end          what runs at the next look has ended, in this state
#   forget       the queue shows no job that has ended
#   accounting   jobs are accounted
#   others       jobs of other people that wait, each as `number|partition|priority`
#   private      jobs of others are hidden
#   cluster      its name is this one
#   strike       `N before PID` or `N after PID`: at the N-th command of all, that process is killed
# `asked` lists every command, `live` the number of jobs at each submission.
state=${SLURM_STAND_IN:?}
jobs=$state/jobs
mkdir -p "$jobs"
me=${0##*/}
echo "$me $*" >> "$state/asked"

strike() {
    [ -f "$state/strike" ] || return 0
    read -r at moment pid < "$state/strike"
    if [ "$moment" = "$1" ] && [ "$(wc -l < "$state/asked")" -ge "$at" ]; then
        rm "$state/strike"
        kill -KILL "$pid"
    fi
}
trap 'strike after' EXIT
strike before

fail() { echo "$1" >&2; exit 1; }
[ -f "$state/busy" ] && fail "$me: error: $(cat "$state/busy")"

value() { printf '%s\n' "${1#*=}"; }

start() {
    (
        cd "$(cat "$1/chdir")" || exit 1
        SLURM_JOB_ID=${1##*/} SLURM_JOB_PARTITION=$(cat "$1/partition")
        export SLURM_JOB_ID SLURM_JOB_PARTITION
        # It outlives the call that makes its script end.
        setsid sh -c 'trap : TERM; sh "$0/script"; echo $? > "$0/status"' "$1" \
            < /dev/null >> "$(cat "$1/output")" 2>&1 &
        echo $! > "$1/pid"
    )
}

# Whether a job can start. A job whose dependency can never be satisfied is cancelled.
may_start() {
    [ -f "$state/hold" ] && return 1
    first=$(cat "$1/after")
    [ -n "$first" ] || return 0
    status=$(cat "$jobs/$first/status" 2> /dev/null)
    [ "$status" = 0 ] && return 0
    if [ -n "$status" ] || [ -f "$jobs/$first/over" ]; then echo CANCELLED > "$1/over"; fi
    return 1
}

# Waiting and running jobs.
live() {
    count=0
    for job in "$jobs"/*/; do
        [ ! -f "$job/over" ] && [ ! -f "$job/status" ] || continue
        if [ ! -f "$job/pid" ] || kill -0 "$(cat "$job/pid")" 2> /dev/null; then count=$((count + 1)); fi
    done
    echo $count
}

# Sends SIGTERM to all processes of a job, and SIGKILL to those that remain.
stop() {
    kill -TERM -"$(cat "$1/pid")"
    i=0
    while kill -0 "$(cat "$1/pid")" 2> /dev/null && [ $i -lt 50 ]; do i=$((i + 1)); sleep 0.1; done
    kill -KILL -"$(cat "$1/pid")" 2> /dev/null
}

submit() {
    name='' chdir='' time='' partition='' try='' output='' after=''
    for option; do
        case $option in
            --job-name=*) name=$(value "$option") ;;
            --chdir=*) chdir=$(value "$option") ;;
            --time=*) time=$(value "$option") ;;
            --partition=*) partition=$(value "$option") ;;
            --output=job.log | --output=stage.log) output=$(value "$option") ;;
            --dependency=afterok:*) after=${option##*:} ;;
            --kill-on-invalid-dep=yes) ;;
            --test-only) try=yes ;;
            --nodes=1 | --ntasks=1 | --cpus-per-task=* | --mem=*M | --gres=gpu:* | --account=* | --qos=*) ;;
            --parsable | --requeue | --open-mode=append | --deadline=now+* | --signal=B:TERM@* | --constraint=*) ;;
            *) fail "sbatch: unrecognized option '$option'" ;;
        esac
    done
    case $partition in cpu | gpu | net) ;; *)
        echo "sbatch: error: invalid partition specified: $partition" >&2
        fail 'sbatch: error: Batch job submission failed: Invalid partition name specified' ;;
    esac
    if [ -n "$try" ]; then
        a=''
        [ -f "$state/newer" ] && a=' a'
        echo "sbatch: Job 99 to start at $(date +%s)$a using 1 processors on nodes n1 in partition $partition" >&2
        exit 0
    fi
    if [ -f "$state/refuse" ]; then
        words=$(cat "$state/refuse")
        rm "$state/refuse"
        fail "sbatch: error: Batch job submission failed: $words"
    fi
    id=1
    until mkdir "$jobs/$id" 2> /dev/null; do id=$((id + 1)); done
    cat > "$jobs/$id/script"
    for field in name chdir time partition output after; do
        eval "printf '%s\n' \"\$$field\" > \"$jobs/$id/$field\""
    done
    [ -n "$output" ] || fail 'sbatch: the output would lie anywhere'
    if may_start "$jobs/$id"; then start "$jobs/$id"; fi
    live >> "$state/live"
    if [ -f "$state/lose-reply" ]; then
        rm "$state/lose-reply"
        fail 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation'
    fi
    echo "$id"
}

# When a job began; one that never did began when it ended.
began() { stat -c %Y "$1/pid" 2> /dev/null || echo "$2"; }

# What waits, whosever it is. Jobs of one's own have the priority 1000.
everybody() {
    for job in "$jobs"/*/; do
        job=${job%/}
        if [ -d "$job" ] && [ ! -f "$job/pid" ] && [ ! -f "$job/over" ]; then
            echo "${job##*/}|$(cat "$job/partition")|1000"
        fi
    done
    [ -f "$state/private" ] || cat "$state/others" 2> /dev/null
    exit 0
}

queue() {
    [ "$*" = '--noheader --states=PENDING --format=%i|%P|%Q' ] && everybody
    wanted="--me --noheader --states=all --format=@job %i|%T|%r|%P|%S|%e|%N|%j"
    [ "$*" = "$wanted" ] || fail "squeue: not $*"
    for job in "$jobs"/*/; do
        job=${job%/}
        [ -d "$job" ] || continue
        if [ ! -f "$job/pid" ] && [ ! -f "$job/over" ] && [ ! -f "$job/back" ] && may_start "$job"; then
            start "$job"
        fi
        starts=N/A ends=N/A node='' reason=None
        if [ -f "$state/end" ] && [ -f "$job/pid" ] && [ ! -f "$job/over" ]; then
            # Jobs past their time limit get SIGTERM first.
            if grep -q TIMEOUT "$state/end"; then stop "$job"; else kill -KILL -"$(cat "$job/pid")"; fi
            cp "$state/end" "$job/over"
        fi
        if [ -f "$job/over" ]; then
            [ ! -f "$state/forget" ] || continue
            word=$(cat "$job/over") ends=$(stat -c %Y "$job/over")
            starts=$(began "$job" "$ends")
        elif [ -f "$job/back" ] || [ ! -f "$job/pid" ]; then
            word=PENDING reason=$(cat "$state/hold" 2> /dev/null || echo BeginTime)
            [ -z "$(cat "$job/after")" ] || reason=Dependency
        elif [ ! -f "$job/status" ] && kill -0 "$(cat "$job/pid")" 2> /dev/null; then
            starts=$(stat -c %Y "$job/pid")
            word=RUNNING node=n1 ends=$((starts + $(cat "$job/time") * 60))
        else
            ends=$(stat -c %Y "$job/status" 2> /dev/null || date +%s)
            starts=$(began "$job" "$ends")
            word=COMPLETED
            [ "$(cat "$job/status" 2> /dev/null)" = 0 ] || word=FAILED reason=NonZeroExitCode
        fi
        echo "@job ${job##*/}|$word|$reason|$(cat "$job/partition")|$starts|$ends|$node|$(cat "$job/name")"
    done
    rm -f "$state/end"
}

account() {
    [ -f "$state/accounting" ] || fail 'Slurm accounting storage is disabled'
    wanted='--noheader --parsable2 --allocations --jobs=* --format=State,Start,End,JobName'
    case $* in $wanted) ;; *) fail "sacct: not $*" ;; esac
    job=$jobs/${4#--jobs=}
    # Those that a person has ended carry who it was.
    ends=$(stat -c %Y "$job/over")
    echo "$(sed 's/^CANCELLED$/CANCELLED by 1000/' "$job/over")|$(began "$job" "$ends")|$ends|$(cat "$job/name")"
}

control() {
    if [ "$1" = requeue ]; then
        # It is never shown as ended.
        : > "$jobs/$2/back"
        stop "$jobs/$2"
        rm -f "$jobs/$2/pid" "$jobs/$2/status"
        rm "$jobs/$2/back"
        exit 0
    fi
    if [ "$*" = 'show config' ]; then
        private=none
        [ -f "$state/private" ] && private=jobs,usage
        printf 'ClusterName             = %s\n' "$(cat "$state/cluster" 2> /dev/null || echo stand-in)"
        printf 'PriorityType            = priority/multifactor\nPrivateData             = %s\n' "$private"
        exit 0
    fi
    [ "$1 $2 $3" = '--oneliner show job' ] || fail "scontrol: not $*"
    [ -f "$jobs/$4/over" ] || fail 'slurm_load_jobs error: Invalid job id specified'
    more='' ends=$(stat -c %Y "$jobs/$4/over")
    [ -f "$state/newer" ] && more=" SubmitLine=sbatch --parsable --job-name=$(cat "$jobs/$4/name") WorkDir=/ StdErr="
    echo "JobId=$4 JobName=$(cat "$jobs/$4/name") UserId=me(1000) JobState=$(cat "$jobs/$4/over") Reason=None" \
        "Dependency=(null) Requeue=1 StartTime=$(began "$jobs/$4" "$ends") EndTime=$ends Deadline=N/A$more"
}

cancel() {
    for job in "$jobs"/*/; do
        job=${job%/}
        [ "$*" = "--user=$(id -un) --name=$(cat "$job/name" 2> /dev/null)" ] || continue
        if [ -f "$job/pid" ] && kill -0 "$(cat "$job/pid")" 2> /dev/null; then
            stop "$job"
        fi
        [ -f "$job/over" ] || echo CANCELLED > "$job/over"
    done
    # A missing job is not an error.
    exit 0
}

info() {
    version='slurm-wlm 22.05.8' more='(S:0-1)'
    [ -f "$state/newer" ] && version='slurm 24.05.5' more='(S:0,1),shard:a100:16'
    case $* in
        --version) echo "$version" ;;
        '-h -o %P') printf 'cpu*\ngpu\n' ;;
        '-h -o %R') printf 'cpu\ngpu\n' ;;
        # No partition has this name.
        '--noheader --exact --partition=gone --format=@nodes %P|%a|%l|%F|%c|%m|%G') ;;
        '--noheader --exact --format=@nodes %P|%a|%l|%F|%c|%m|%G')
            echo '@nodes cpu*|up|1-00:00:00|0/3/0/3|4|16000|(null)'
            echo "@nodes gpu|up|2-00:00:00|1/1/0/2|64|512000|gpu:a100:4$more" ;;
        *) fail "sinfo: not $*" ;;
    esac
}

case $me in
    sbatch) submit "$@" ;;
    squeue) queue "$@" ;;
    scancel) cancel "$@" ;;
    sinfo) info "$@" ;;
    sacct) account "$@" ;;
    scontrol) control "$@" ;;
    *) fail "$me is none of Slurm's commands" ;;
esac
