# shellcheck shell=bash
# For the scripts that start something, before all else: a signal to stop, whoever SLURM sends it to and however early,
# becomes a file that the job looks at. Each start on each node has its own, so one that is left over stops nothing.
file=/tmp/ddpm-stop.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.${SLURM_NODEID:-0}
# Job numbers come again. A node.sh that is given this very name shares its batch script's file, which may be a request.
[ "${DDPM_STOP_FILE:-}" = "$file" ] || rm -f "$file"
export DDPM_STOP_FILE=$file
trap 'touch "$DDPM_STOP_FILE"' USR1 USR2 TERM
trap 'trap "" USR1 USR2 TERM; rm -f "$DDPM_STOP_FILE"' EXIT

# stoppable COMMAND …: run it to its end; the exit code is its own.
stoppable() {
  "$@" &
  local process=$!
  while kill -0 "$process" 2> /dev/null; do wait "$process"; done   # a trap ends a `wait` early
  wait "$process"
}

# This job; a task of an array has a number of its own, as the array's may mean all of its tasks.
me=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

# still_wanted: not where SLURM itself ends the job, as a requeue would undo an scancel.
still_wanted() { [[ $(squeue -h -j "$me" -o "%T %r") =~ ^RUNNING|TimeLimit$ ]]; }

# leave CODE: end as a command did that stops on request with 75 and is then to be started again.
leave() {
  if [ "$1" = 75 ] && still_wanted && scontrol requeue "$me"; then exit 0; fi
  exit "$1"
}
