# shellcheck shell=bash
# The only file to edit for a cluster. Each script reads it, on each node, in the directory that holds launch/.
# Give partition, account, time limit and GPUs to sbatch on its command line, or set once
# SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and SBATCH_GPUS_PER_NODE in your environment.

# 1. The software: modules, then the environment that `ddpm` is installed in.
# module load cuda/12.8
# . ~/.local/share/pipx/venvs/ddpm-pipeline/bin/activate   # after pipx install
# shellcheck disable=SC1091  # the file may not exist
if [ -r .venv/bin/activate ]; then . .venv/bin/activate; fi

# 2. Or a container: the words before each command. It must see data, runs, this directory and /tmp.
# shellcheck disable=SC2034  # the scripts use it
CONTAINER=()
# CONTAINER=(apptainer exec --nv --bind /scratch "$HOME/ddpm.sif")

# 3. Training processes on a node: one for each GPU that SLURM gave. On CPU nodes: RANKS_PER_NODE=4 sbatch …
export RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# 4. CPU threads of a process: the cores of the node divided by its processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_ON_NODE:-1} + RANKS_PER_NODE - 1) / RANKS_PER_NODE))}

# 5. The network, if NCCL does not find it.
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO
