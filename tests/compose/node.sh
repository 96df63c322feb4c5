#!/bin/bash
# A node: a mount, process, host-name, cgroup and, unless NETWORK is "machine", network namespace with
# dockerd in it. Its first process waits to be killed, which ends everything in the node.
# Usage: node.sh machine|own WORK CACHE CGROUP2; run.sh calls it (see engine.sh).
set -eu
network=$1 work=$2 cache=$3 cgroup2=$4
name=$(basename "$work")

join_cgroups() { # a child of this process's own cgroup in every hierarchy: nothing of the node is outside
	local controllers path dir
	while IFS=: read -r _ controllers path; do
		controllers=${controllers#name=}
		if [ -n "$controllers" ]; then dir=/sys/fs/cgroup/$controllers${path%/}; else dir=$cgroup2${path%/}; fi
		mkdir -p "$dir/$name"
		if [ "$controllers" = cpuset ]; then
			cat "$dir/cpuset.cpus" >"$dir/$name/cpuset.cpus"
			cat "$dir/cpuset.mems" >"$dir/$name/cpuset.mems"
		fi
		echo $$ >"$dir/$name/cgroup.procs"
	done <<<"$(cat /proc/self/cgroup)" # read whole: it changes with each join
}

mount_cgroups() { # anew: in this cgroup namespace each shows only what is the node's
	local controllers
	umount -R /sys
	mount -t sysfs sysfs /sys
	if ! grep -q '^[1-9]' /proc/self/cgroup; then
		mount -t cgroup2 cgroup2 /sys/fs/cgroup
		# A cgroup that gives controllers to its children holds no process itself.
		mkdir /sys/fs/cgroup/system
		echo 1 >/sys/fs/cgroup/system/cgroup.procs
		return
	fi
	mount -t tmpfs tmpfs /sys/fs/cgroup
	mkdir /sys/fs/cgroup/unified
	mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
	# shellcheck disable=SC2013  # words
	for controllers in $(sed -n 's/^[1-9][0-9]*:\(.*\):.*/\1/p' /proc/self/cgroup); do
		mkdir "/sys/fs/cgroup/${controllers#name=}"
		case $controllers in
		name=*) mount -t cgroup -o "none,$controllers" cgroup "/sys/fs/cgroup/${controllers#name=}" ;;
		*) mount -t cgroup -o "$controllers" cgroup "/sys/fs/cgroup/$controllers" ;;
		esac
	done
}

if [ "${INSIDE:-}" != yes ]; then
	join_cgroups
	kinds=(--mount --pid --uts --ipc --cgroup)
	[ "$network" = machine ] || kinds+=(--net)
	INSIDE=yes exec unshare "${kinds[@]}" --fork --kill-child=KILL --propagation private bash "$0" "$@"
fi

read -r outer_pid _ </proc/self/stat # /proc is still the machine's
mount -t proc proc /proc
mount_cgroups
hostname "$name"
if [ "$network" = own ]; then
	mount -t tmpfs tmpfs /run
	mkdir /run/netns
	ip link set lo up
fi
mount --make-rshared /
[ "$network" = own ] || bridge=none
dockerd --host "unix://$work/docker.sock" --data-root "$cache/root" --exec-root "$work/exec" --pidfile "$work/docker.pid" \
	--bridge "${bridge:-}" --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false &
echo "$outer_pid" >"$work/node.pid"
wait # and reap what the node's processes leave
