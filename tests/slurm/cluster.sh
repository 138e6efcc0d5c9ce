#!/usr/bin/env bash
# A real SLURM on one machine: the controller `ctl` and the nodes n1 and n2, each a host of its own as far as network,
# host name and /etc/hosts go. No systemd, no slurmdbd, nothing under /etc. Needs root; written for slurm-wlm 22.05.
#   cluster.sh up DIR; export SLURM_CONF=DIR/slurm.conf; sinfo; sbatch …; cluster.sh down DIR
#   cluster.sh killnode DIR n2     the host dies: every process of it, at once
#   cluster.sh startnode DIR n2    it is switched on again
set -euo pipefail

HOSTS=(ctl n1 n2)   # NETWORK.1, .2, .3
BRIDGE=ddpm-slurm
NETWORK=10.77.41

namespace() { echo "ddpm-$1"; }

# Production tracks processes by cgroup, and so decides who hears a signal; that needs cgroup v1's freezer here.
tracking() { if [ -w /sys/fs/cgroup/freezer ]; then echo cgroup; else echo pgid; fi; }

configure() {
  local dir=$1 track
  track=$(tracking)
  cat > "$dir/slurm.conf" <<CONF
ClusterName=ddpm
SlurmctldHost=ctl($NETWORK.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for cred_expire, 120 s if not said otherwise.
AuthInfo=socket=$dir/munge/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/slurmd.%n.log
SlurmdSpoolDir=$dir/spool.%n
SlurmdParameters=config_overrides
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/$track
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=300
NodeName=n1 NodeAddr=$NETWORK.2 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeAddr=$NETWORK.3 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main   Nodes=n[1-2] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-2] Default=NO State=UP PriorityTier=10 PreemptMode=OFF
CONF
  [ "$track" != cgroup ] || printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no CgroupMountpoint=/sys/fs/cgroup \
    ConstrainCores=no ConstrainRAMSpace=no > "$dir/cgroup.conf"
  printf '%s\n' "127.0.0.1 localhost" "$NETWORK.1 ctl" "$NETWORK.2 n1" "$NETWORK.3 n2" > "$dir/hosts"
}

# Not `ip netns exec`: it mounts a fresh /sys, which hides the cgroups from slurmd.
on_host() {
  local dir=$1 host=$2
  shift 2
  # shellcheck disable=SC2016  # expands in the inner shell
  nsenter --net="/run/netns/$(namespace "$host")" unshare --uts --mount bash -c \
    'mount --bind "$0/hosts" /etc/hosts; hostname "$1"; shift; exec "$@"' "$dir" "$host" "$@"
}

startnode() { on_host "$1" "$2" slurmd -N "$2" -c -f "$1/slurm.conf"; }

killnode() {
  local pids
  while pids=$(ip netns pids "$(namespace "$2")") && [ -n "$pids" ]; do
    # shellcheck disable=SC2086  # one word a process
    kill -9 $pids 2> /dev/null || true
  done
}

up() {
  local dir host number=0
  down "$1"   # what a killed session has left
  mkdir -p "$1"/{state,munge,spool.n1,spool.n2}
  dir=$(cd "$1" && pwd)
  chmod 755 "$dir"
  configure "$dir"
  ip link add "$BRIDGE" type bridge
  ip addr add "$NETWORK.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for host in "${HOSTS[@]}"; do
    number=$((number + 1))
    ip netns add "$(namespace "$host")"
    ip -n "$(namespace "$host")" link set lo up
    ip link add "ddpm-$host" type veth peer name eth0 netns "$(namespace "$host")"
    ip link set "ddpm-$host" master "$BRIDGE" up
    ip -n "$(namespace "$host")" addr add "$NETWORK.$number/24" dev eth0
    ip -n "$(namespace "$host")" link set eth0 up
  done
  (umask 077; head -c 128 /dev/urandom > "$dir/munge/munge.key")
  # --force: root may run it, and the folders above may be writable by others.
  on_host "$dir" ctl munged --force --key-file="$dir/munge/munge.key" --socket="$dir/munge/munge.socket" \
    --seed-file="$dir/munge/seed" --pid-file="$dir/munge/munged.pid" --log-file="$dir/munge/munged.log"
  on_host "$dir" ctl slurmctld -c -f "$dir/slurm.conf"
  startnode "$dir" n1
  startnode "$dir" n2
  for _ in $(seq 300); do
    [ "$(SLURM_CONF=$dir/slurm.conf sinfo -h -N -p main -o %T 2> /dev/null | grep -c '^idle$')" != 2 ] || return 0
    sleep 0.1
  done
  tail -n 5 "$dir"/*.log >&2
  return 1
}

down() {
  local host
  for host in "${HOSTS[@]}"; do
    [ -e "/run/netns/$(namespace "$host")" ] || continue
    killnode "$1" "$host"
    ip netns del "$(namespace "$host")"
    ip link del "ddpm-$host" 2> /dev/null || true   # gone with its peer, sooner or later
    # The kernel lets go of a cgroup a moment after its last process.
    for _ in $(seq 50); do
      find /sys/fs/cgroup/*/"slurm_$host" -depth -type d -exec rmdir {} + 2> /dev/null || true
      compgen -G "/sys/fs/cgroup/*/slurm_$host" > /dev/null || break
      sleep 0.1
    done
  done
  ip link del "$BRIDGE" 2> /dev/null || true
}

case "${1:-}" in
  up | down | killnode | startnode) "$@" ;;
  *) sed -n 2,7p "$0"; exit 2 ;;
esac
