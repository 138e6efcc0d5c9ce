#!/usr/bin/env bash
# One of these runs on each node of a training job, as an srun task. It starts the node's ranks and owns its signals:
# the launcher hears none, so that all ranks save the same step and leave in good order.
#   node.sh CONFIG.yaml [key=value …]      with MASTER and PORT from train.sbatch
set -u
. launch/stoppable.sh
. launch/env.sh

processes=$((SLURM_NNODES * RANKS_PER_NODE))
if [ "$processes" = 1 ]; then   # accelerate's launcher for one process would die of a signal and leave it alone
  command=(python -m pipeline.train)
else
  # USR1 and USR2 would kill the launcher. TERM comes to it where SLURM signals every process: it hands that on, and
  # kills after PET_SHUTDOWN_TIMEOUT. A rank that fails ends the job, as a requeue outlives a lost node and a restart
  # in place does not.
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
