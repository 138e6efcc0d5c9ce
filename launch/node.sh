#!/usr/bin/env bash
# srun starts this script once on each node of a training job. It starts the ranks of the node and handles all signals:
# the launcher gets none, so that all ranks save the same step and end together.
#   node.sh CONFIG.yaml [key=value …]      with MASTER and PORT from train.sbatch
set -u
. launch/stoppable.sh
. launch/env.sh

processes=$((SLURM_NNODES * RANKS_PER_NODE))
if [ "$processes" = 1 ]; then   # a signal would kill accelerate's launcher of one process, but not the process
  command=(python -m pipeline.train)
else
  # USR1 and USR2 would kill the launcher. Where SLURM sends TERM to every process, the launcher passes it on, and
  # kills the ranks after PET_SHUTDOWN_TIMEOUT. A rank that fails ends the job: a requeued job can replace a lost node,
  # a restart in place cannot.
  export PET_SHUTDOWN_TIMEOUT=120
  # shellcheck disable=SC2016  # expanded by the inner shell
  command=(bash -c 'trap "" USR1 USR2; exec "$@"' ignoring   # env --ignore-signal is missing on older systems
    accelerate launch --config_file launch/accelerate/multi_node.yaml --multi_gpu --num_machines "$SLURM_NNODES"
    --num_processes "$processes" --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER"
    --main_process_port "$PORT" --max_restarts 0 --dynamo_backend no -m pipeline.train)
fi

config=$1
shift
stoppable "${CONTAINER[@]}" "${command[@]}" --config "$config" "$@"
