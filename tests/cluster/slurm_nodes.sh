#!/usr/bin/env bash
# Start SLURM with two virtual nodes, n1 and n2, on the loopback of this machine, run a command, and
# stop SLURM with it. Needs root.
#
#   unshare --net --pid --mount --fork --kill-child --mount-proc \
#     bash slurm_nodes.sh COMMAND [ARG ...]
#
# The private namespaces keep the daemons, which listen on every address, off the network. 127.0.0.2
# makes 127.0.0.1 resolvable: glibc's AI_ADDRCONFIG requires an address other than 127.0.0.1. There is
# no accounting database, so no sacct.
set -eu
ip link set lo up
ip addr add 127.0.0.2/8 dev lo
base=$(mktemp -d) host=$(hostname -s)
export SLURM_CONF=$base/slurm.conf
mkdir -p "$base"/{state,spool-n1,spool-n2} /run/munge
mount -t tmpfs none /run/munge && chmod 755 /run/munge
head -c 1024 /dev/urandom > "$base/munge.key" && chmod 600 "$base/munge.key"
munged --force --key-file="$base/munge.key" --pid-file="$base/munged.pid" \
  --log-file="$base/munged.log" --seed-file="$base/seed" 2> /dev/null
cat > "$SLURM_CONF" << CONF
ClusterName=infir2
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
SlurmctldPort=16817
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool-%n
SlurmctldLogFile=$base/slurmctld.log
SlurmdLogFile=$base/slurmd-%n.log
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16821 CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16822 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$base/cgroup.conf"
slurmctld
sleep 1
for node in n1 n2; do slurmd -N $node; done
for _ in $(seq 30); do [ "$(sinfo -h -t idle -o %D)" = 2 ] && break; sleep 1; done
[ "$(sinfo -h -t idle -o %D)" = 2 ] || { tail -n 8 "$base"/*.log >&2; exit 1; }
"$@"
