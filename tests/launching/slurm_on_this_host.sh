#!/usr/bin/env bash
# A real Slurm of two nodes on this host (Debian: apt-get install --no-install-recommends slurmctld
# slurmd slurm-client munge), in a folder of its own, and in it the first stages of the tiny
# pipeline, submitted by lopd launch. Ends every daemon it has started. Needs root, nemo-run's
# environment, some minutes.
#   bash tests/launching/slurm_on_this_host.sh             # demonstrate by two workers, then sft on
#                                                          both nodes
#   bash tests/launching/slurm_on_this_host.sh COMMAND...  # or any command, with SLURM_CONF set
# docs/launch.md tells what was seen.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d /tmp/lopd-slurm.XXXXXX)
pids=()
down() {
    code=$?
    trap - EXIT
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    if [ "$code" -ne 0 ]; then tail -n 20 "$work"/log/*.log || true; fi
    if [ "${LOPD_KEEP:-0}" = 1 ]; then echo "kept: $work"; else rm -rf "$work"; fi
    exit "$code"
}
trap down EXIT
for tool in munged slurmctld slurmd sbatch; do
    command -v "$tool" >/dev/null || { echo "missing: $tool (apt-get install --no-install-recommends slurmctld slurmd slurm-client munge)" >&2; exit 2; }
done

mkdir -m 755 "$work"/{etc,log,state,munge,spool1,spool2}
chmod 755 "$work"
dd if=/dev/urandom of="$work/etc/munge.key" bs=128 count=1 status=none
chmod 400 "$work/etc/munge.key"
host=$(hostname -s)
cat > "$work/etc/slurm.conf" <<CONF
ClusterName=lopd
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool%n
SlurmctldPidFile=$work/state/slurmctld.pid
SlurmdPidFile=$work/state/slurmd-%n.pid
SlurmctldLogFile=$work/log/slurmctld.log
SlurmdLogFile=$work/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MinJobAge=3600
KillWait=10
NodeName=1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16821 CPUs=2 State=UNKNOWN
NodeName=2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16822 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=1,2 Default=YES MaxTime=01:00:00 State=UP
CONF
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$work/etc/cgroup.conf"
export SLURM_CONF=$work/etc/slurm.conf
munged --foreground --force --key-file="$work/etc/munge.key" --socket="$work/munge/socket" --pid-file="$work/munge/pid" \
    --log-file="$work/log/munged.log" --seed-file="$work/munge/seed" &
pids+=($!)
for _ in $(seq 50); do [ -S "$work/munge/socket" ] && break; sleep 0.1; done
slurmctld -D -i >"$work/log/slurmctld.out.log" 2>&1 &
pids+=($!)
for node in 1 2; do
    slurmd -D -N "$node" >"$work/log/slurmd-$node.out.log" 2>&1 &
    pids+=($!)
done
for _ in $(seq 60); do [ "$(sinfo -h -o %D -t idle 2>/dev/null)" = 2 ] && break; sleep 0.5; done
sinfo
[ "$(sinfo -h -o %D -t idle)" = 2 ]

if [ $# -gt 0 ]; then "$@"; exit; fi
run=${LOPD_RUN_DIR:-$work/run}
overrides=(run.dir="$run" launch.device=cpu launch.workers=2 launch.slurm.minutes=20 launch.retries=1
    prompts.sft.num_prompts=64 demonstrate.shard_size=16 sft.num_steps=2 sft.batch_size=32
    sft.parallel.nodes=2 launch.env.LOPD_NODE_ADDRESS=127.0.0.1) # Slurm's two nodes are this host
lopd() { "$root/.venv/bin/python" -m lopd.cli "$@"; }
for round in first second; do # the second time everything is reused: resume by resubmission
    lopd launch "$root/examples/tiny_moe.toml" "${overrides[@]}" --on slurm --stages demonstrate,sft
    for _ in $(seq 300); do
        [ -z "$(squeue -h)" ] && break
        sleep 1
    done
    echo "--- $round submission"
    scontrol -o show jobs | sed -E 's/.*(JobId=[^ ]*).*(JobName=[^ ]*).*(JobState=[^ ]*).*(Dependency=[^ ]*).*(ExitCode=[^ ]*).*(RunTime=[^ ]*).*(NodeList=[^ ]*).*/\1 \2 \3 \4 \6 \7/' || true
    lopd status "$root/examples/tiny_moe.toml" "${overrides[@]}"
done
lopd status "$root/examples/tiny_moe.toml" "${overrides[@]}" --json | "$root/.venv/bin/python" -c '
import json, sys
states = {row["name"]: row["state"] for row in json.load(sys.stdin)}
assert states["demonstrate"] == states["sft"] == "done", states'
grep -h "worker\|reused\|done in" "$run"/*/log.txt
