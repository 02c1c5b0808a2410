#!/usr/bin/env bash
# Two machines on this one: network namespaces joined by a bridge. sft of the tiny pipeline over both, through lopd's own code; then one of them loses its network
# in the middle of the training, and the same commands go on. Needs root and iproute2, some minutes. docs/launch.md tells what was seen.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d /tmp/lopd-nodes.XXXXXX)
net=lopd$$
pids=()
down() {
    code=$?
    trap - EXIT
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for node in a b; do
        ip netns del "$net-$node" 2>/dev/null || true
        rm -rf "/etc/netns/$net-$node"
    done
    ip link del "$net" 2>/dev/null || true
    if [ "${LOPD_KEEP:-0}" = 1 ]; then echo "kept: $work"; else rm -rf "$work"; fi
    exit "$code"
}
trap down EXIT

ip link add "$net" type bridge
ip addr add 10.77.0.254/24 dev "$net"
ip link set "$net" up
for node in a b; do
    mkdir -p "/etc/netns/$net-$node" # ip netns exec puts these files in the place of /etc's: torch looks up the names of its peers, which must not take long
    printf '127.0.0.1 localhost\n10.77.0.1 %s-a\n10.77.0.2 %s-b\n' "$net" "$net" >"/etc/netns/$net-$node/hosts"
    echo "nameserver 127.0.0.1" >"/etc/netns/$net-$node/resolv.conf"
    ip netns add "$net-$node"
    ip link add "v$node$$" type veth peer name eth0 netns "$net-$node"
    ip link set "v$node$$" master "$net" up
    ip -n "$net-$node" link set lo up
    ip -n "$net-$node" link set eth0 up
    ip -n "$net-$node" addr add "10.77.0.$([ "$node" = a ] && echo 1 || echo 2)/24" dev eth0
    ip -n "$net-$node" route add default via 10.77.0.254
done

small=(prompts.sft.num_prompts=64 sft.batch_size=16 sft.checkpoint_every=4 sft.timeout_s=15 sft.log_every=1)
lopd() { OMP_NUM_THREADS=1 "$root/.venv/bin/python" -m lopd.cli "$@"; }
on() { # on NODE ARGS...: lopd on that machine
    local node=$1
    shift
    OMP_NUM_THREADS=1 ip netns exec "$net-$node" "$root/.venv/bin/python" -m lopd.cli "$@"
}
spread() { # spread RUN OVERRIDES...: sft on both machines at once, logs in RUN.a.log and RUN.b.log; prints the exit codes
    local run=$1 first=0 second=0
    shift
    on b sft "$root/examples/tiny_moe.toml" "${small[@]}" run.dir="$run" sft.parallel.nodes=2 "$@" --node 1/2 >>"$run.b.log" 2>&1 &
    local follower=$!
    pids+=("$follower")
    on a sft "$root/examples/tiny_moe.toml" "${small[@]}" run.dir="$run" sft.parallel.nodes=2 "$@" --node 0/2 >>"$run.a.log" 2>&1 || first=$?
    for _ in $(seq 300); do kill -0 "$follower" 2>/dev/null || break; sleep 0.1; done
    kill "$follower" 2>/dev/null && echo "the second machine was still waiting"
    wait "$follower" || second=$?
    echo "exit codes: $first of the first machine, $second of the second"
}
hash_of() { sha256sum "$1"/sft/model/*.safetensors | cut -c1-16; }

made=(sft.demonstrations="${LOPD_DEMONSTRATIONS:-$work/one/demonstrate}")
if [ -z "${LOPD_DEMONSTRATIONS:-}" ]; then
    lopd demonstrate "$root/examples/tiny_moe.toml" "${small[@]}" run.dir="$work/one" | tail -n 1
fi
echo "--- one machine, two ranks"
lopd sft "$root/examples/tiny_moe.toml" "${small[@]}" "${made[@]}" sft.num_steps=6 run.dir="$work/alone" | grep -F "done in"
echo "--- two machines, a rank each"
spread "$work/spread" "${made[@]}" sft.num_steps=6
grep -h "done in\|error\|follows" "$work"/spread.?.log || true
echo "weights: $(hash_of "$work/alone") on one machine, $(hash_of "$work/spread") on two"
[ "$(hash_of "$work/alone")" = "$(hash_of "$work/spread")" ]

echo "--- the second machine loses its network in the middle"
(
    while ! grep -qs '"step": 12,' "$work/lost/metrics.jsonl"; do sleep 0.1; done
    ip -n "$net-b" link set eth0 down
    echo "$(date +%T) eth0 of the second machine is down"
) &
pids+=($!)
spread "$work/lost" "${made[@]}" sft.num_steps=200
echo "$(date +%T) both have ended"
grep -h "error" "$work"/lost.?.log || tail -n 5 "$work"/lost.?.log
ls "$work/lost/sft/checkpoints"
ip -n "$net-b" link set eth0 up
ip -n "$net-b" route replace default via 10.77.0.254
echo "--- the same commands again"
: >"$work/lost.a.log"
spread "$work/lost" "${made[@]}" sft.num_steps=200
grep -h "resum\|goes on\|done in\|error" "$work/lost.a.log" || tail -n 5 "$work/lost.a.log"
head -n 2 "$work/lost.a.log"
lopd status "$root/examples/tiny_moe.toml" "${small[@]}" "${made[@]}" sft.num_steps=200 run.dir="$work/lost" | grep -F sft
