# shellcheck shell=bash
# The other scripts read this file first. It turns a signal to stop, to any process and at any time, into a file that
# the job polls. Each start on each node has a file of its own, so a leftover file stops nothing.
file=/tmp/ddpm-stop.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.${SLURM_NODEID:-0}
# SLURM reuses job numbers: remove an old file. But node.sh may share the file of its batch script: keep that one.
[ "${DDPM_STOP_FILE:-}" = "$file" ] || rm -f "$file"
export DDPM_STOP_FILE=$file
trap 'touch "$DDPM_STOP_FILE"' USR1 USR2 TERM
trap 'trap "" USR1 USR2 TERM; rm -f "$DDPM_STOP_FILE"' EXIT

# stoppable COMMAND …: run a command to its end; returns its exit code.
stoppable() {
  "$@" &
  local process=$!
  while kill -0 "$process" 2> /dev/null; do wait "$process"; done   # a trap ends a `wait` early
  wait "$process"
}

# This job, or this task of a job array: the number of an array may mean all of its tasks.
me=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

# still_wanted: whether the job may be requeued; not if SLURM ends it, as a requeue would undo an scancel.
still_wanted() { [[ $(squeue -h -j "$me" -o "%T %r") =~ ^RUNNING|TimeLimit$ ]]; }

# leave CODE: exit with the code of a command; requeue the job if the command was stopped on request (75).
leave() {
  if [ "$1" = 75 ] && still_wanted && scontrol requeue "$me"; then exit 0; fi
  exit "$1"
}
