#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a cable, each with a host name and an /etc/hosts of its own.
#   two_hosts.sh up | down | cut | mend
#   two_hosts.sh exec 0|1 COMMAND…        the process number stays the command's own
# Root; iproute2 and util-linux. The hosts are ddpm0 = 10.78.0.1 and ddpm1 = 10.78.0.2.
set -euo pipefail
hosts=(ddpm0 ddpm1) net=10.78.0
case "${1:?up, down, cut, mend or exec}" in
up)
  for i in 0 1; do
    ip netns add "${hosts[i]}"
    ip -n "${hosts[i]}" link set lo up
    mkdir -p "/etc/netns/${hosts[i]}"
    printf '127.0.0.1 localhost\n%s.1 %s\n%s.2 %s\n' "$net" "${hosts[0]}" "$net" "${hosts[1]}" > "/etc/netns/${hosts[i]}/hosts"
  done
  ip -n "${hosts[0]}" link add eth0 type veth peer name eth0 netns "${hosts[1]}"
  for i in 0 1; do
    ip -n "${hosts[i]}" addr add "$net.$((i + 1))/24" dev eth0
    ip -n "${hosts[i]}" link set eth0 up
  done
  ;;
exec)
  host=${hosts[$2]}
  shift 2
  # shellcheck disable=SC2016  # expanded by the inner shell
  exec ip netns exec "$host" unshare --uts -- bash -c 'hostname "$0"; exec "$@"' "$host" "$@"
  ;;
cut) ip -n "${hosts[1]}" link set eth0 down ;;  # silent: neither side hears of it
mend) ip -n "${hosts[1]}" link set eth0 up ;;
down)
  for host in "${hosts[@]}"; do
    ip netns pids "$host" 2> /dev/null | xargs -r kill -9
    ip netns del "$host" 2> /dev/null || true
    rm -rf "/etc/netns/$host"
  done
  ;;
esac
