#!/bin/bash
# start_slurm.sh DIR: as root on Debian, start a private SLURM cluster on this host, every file of it in DIR.
# slurmctld, slurmd, munge, and slurmdbd with MariaDB (submitit asks sacct). Each node has CPUS cores and two
# fake GPUs. DIR is a short path (sockets), mode 755, below no group-writable folder.
# cred_expire delays a requeued job until nothing of its first run is left: SLURM drains a node that still has it.
# Settings: NODES=1 CPUS=4 GRACE=20 PORT=16817 (seven ports from there on)
# Afterwards: export SLURM_CONF=DIR/slurm.conf
set -euo pipefail
trap 'echo "start_slurm: line $LINENO failed: $BASH_COMMAND" >&2; tail -n 5 "$DIR"/*.out "$DIR"/*.log "$DIR"/db/*.log >&2 2>/dev/null || true' ERR
DIR=${1:?usage: start_slurm.sh DIR}
mkdir -p "$DIR"; chmod 755 "$DIR"; DIR=$(cd "$DIR" && pwd -P)
: "${NODES:=1}" "${CPUS:=4}" "${GRACE:=20}" "${PORT:=16817}"
HOST=$(hostname -s)
log() { echo "start_slurm: $*" >&2; }
export SLURM_CONF=$DIR/slurm.conf

need=(); for p in slurmctld slurmd munge slurm-client slurmdbd mariadb-server-core mariadb-client-core; do
  dpkg -s "$p" >/dev/null 2>&1 || need+=("$p")
done
if [ ${#need[@]} -gt 0 ]; then
  log "installing ${need[*]}"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}"; } \
    </dev/null >"$DIR/apt.log" 2>&1 || { tail -n 20 "$DIR/apt.log" >&2; exit 1; }
fi

resolves() { getent hosts "$1" >/dev/null || echo "127.0.0.1 $1" >>/etc/hosts; }
resolves "$HOST"
if [ "$NODES" = 1 ]; then NAMES=("$HOST"); else NAMES=(); for i in $(seq "$NODES"); do NAMES+=("n$i"); resolves "n$i"; done; fi
mkdir -p "$DIR"/{state,spool,dev,munge}; chmod 755 "$DIR/munge"
[ -s "$DIR/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/key")
# Only character devices make CUDA_VISIBLE_DEVICES appear: bare counts invalidate the node.
for i in 0 1; do [ -c "$DIR/dev/nvidia$i" ] || mknod -m 666 "$DIR/dev/nvidia$i" c 1 3; done
: >"$DIR/plugstack.conf"
MEM=$(awk '/MemTotal/{print int($2/1024)-512}' /proc/meminfo)
LIST=$(IFS=,; echo "${NAMES[*]}")
cat >"$DIR/slurm.conf" <<CONF
ClusterName=probe
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge/sock,cred_expire=12
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$PORT
SlurmdPort=$((PORT+1))
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
PlugStackConfig=$DIR/plugstack.conf
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT+2))
AccountingStoragePass=$DIR/munge/sock
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=limits
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
FirstJobId=$(( ($(date +%s) % 600000) * 100 + 1 ))
MinJobAge=3600
MaxJobCount=10000
KillWait=2
CompleteWait=0
InactiveLimit=0
ReturnToService=1
SlurmctldTimeout=60
SlurmdTimeout=60
$(for i in "${!NAMES[@]}"; do
  port=$((PORT+1)); [ "$NODES" = 1 ] || port=$((PORT+4+i))
  echo "NodeName=${NAMES[$i]} NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$port CPUs=$CPUS RealMemory=$((MEM/NODES)) Gres=gpu:2 State=UNKNOWN"
done)
PartitionName=low  Nodes=$LIST Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE MaxTime=INFINITE State=UP
PartitionName=high Nodes=$LIST PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
{ echo "AutoDetect=off"; for n in "${NAMES[@]}"; do echo "NodeName=$n Name=gpu File=$DIR/dev/nvidia[0-1]"; done; } >"$DIR/gres.conf"

M=$DIR/munge
munged --key-file="$M/key" --socket="$M/sock" --pid-file="$M/pid" --log-file="$M/log" --seed-file="$M/seed" \
  --num-threads=10 </dev/null >"$M/out" 2>&1 || { cat "$M/out" >&2; exit 1; }
D=$DIR/db; mkdir -p "$D"
mariadb-install-db --no-defaults --user=root --datadir="$D/data" --auth-root-authentication-method=normal \
  --skip-test-db --skip-name-resolve >"$D/install.log" 2>&1
setsid mariadbd --no-defaults --user=root --datadir="$D/data" --socket="$D/sock" --pid-file="$D/pid" \
  --bind-address=127.0.0.1 --port=$((PORT+3)) --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
  --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --skip-name-resolve </dev/null >"$D/mariadbd.log" 2>&1 &
for _ in $(seq 300); do mariadb --no-defaults -S "$D/sock" -e 'select 1' >/dev/null 2>&1 && break; sleep 0.1; done
mariadb --no-defaults -S "$D/sock" -e \
  "create user if not exists slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm_acct_db.* to slurm@'127.0.0.1';"
(umask 077; cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/sock
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$((PORT+2))
SlurmUser=root
LogFile=$DIR/slurmdbd.log
PidFile=$DIR/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT+3))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
)
slurmdbd </dev/null >"$DIR/slurmdbd.out" 2>&1
for _ in $(seq 300); do timeout 5 sacctmgr -n show cluster >/dev/null 2>&1 && break; sleep 0.1; done
slurmctld -f "$DIR/slurm.conf" </dev/null >"$DIR/slurmctld.out" 2>&1 || { cat "$DIR/slurmctld.out" >&2; exit 1; }
for n in "${NAMES[@]}"; do
  mkdir -p "$DIR/spool/$n"
  slurmd -f "$DIR/slurm.conf" -N "$n" </dev/null >"$DIR/slurmd.$n.out" 2>&1 || { cat "$DIR/slurmd.$n.out" >&2; exit 1; }
done
idle=0
for _ in $(seq 150); do
  idle=$(timeout 5 sinfo -h -N -p low -o %T 2>/dev/null | grep -c '^idle$' || true)
  [ "$idle" = "$NODES" ] && break
  sleep 0.2
done
[ "$idle" = "$NODES" ] || { log "only $idle of $NODES nodes idle"; tail -n 20 "$DIR"/slurmctld.log "$DIR"/slurmd.*.log >&2; exit 1; }
log "$NODES nodes idle"
