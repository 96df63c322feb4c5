# What run.sh needs before it can use compose: a container engine of its own, and a base image.
#
# The engine is unpacked from Debian's packages into a cache folder, nothing is installed. It runs in
# namespaces and cgroups of its own; when their first process ends, all that ran in them is gone.
# It reads run.sh's: cache (kept), work (ends with the run), here, cgroup2 (where it is mounted), say.
# shellcheck shell=bash disable=SC2154

ENGINE_PACKAGES="docker.io/trixie docker-cli/trixie docker-compose/trixie docker-buildx/trixie
	containerd/trixie runc/bookworm mmdebstrap/bookworm"  # a newer runc needs a newer C library
BASE_SUITE=bookworm
# shellcheck disable=SC2034  # run.sh's
BASE_IMAGE=pykmesh-base:$BASE_SUITE
node_job="" node_pid=""

until_true() { # until_true SECONDS COMMAND...: false at the deadline
	local end=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.1
	done
}

# --- packages

private_apt() { # an apt with its own sources and lists, from the mirror that the machine's own apt uses
	timeout 180 "$1" -o Dir::Etc::sourcelist="$cache/apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State="$cache/apt/state" \
		-o Dir::Cache="$cache/apt/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root \
		-o Acquire::Retries=2 -o Acquire::http::Timeout=20 -qq "${@:2}"
}

fetch_engine() { # unpacks what is not there yet; false when it cannot be had
	local stamp=$cache/engine/.packages suite site package
	[ "$(cat "$stamp" 2>/dev/null)" != "$ENGINE_PACKAGES" ] || return 0
	command -v apt-get >/dev/null || return 1
	# shellcheck disable=SC2016  # apt's own variable
	site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Label: Debian' 'Component: main' | head -n 1)
	[ -n "$site" ] || return 1
	rm -rf "$cache/apt" "$cache/engine"
	mkdir -p "$cache/apt/state/lists/partial" "$cache/apt/cache/archives/partial" "$cache/apt/debs" "$cache/engine"
	for suite in bookworm trixie; do echo "deb $site $suite main"; done >"$cache/apt/sources.list"
	say "fetching the container engine from Debian's packages"
	private_apt apt-get update || return 1
	for package in $ENGINE_PACKAGES; do
		(cd "$cache/apt/debs" && private_apt apt-get download "$package" >/dev/null) || return 1
	done
	for package in "$cache"/apt/debs/*.deb; do dpkg-deb -x "$package" "$cache/engine" || return 1; done
	rm -rf "$cache/apt/debs" "$cache/apt/cache"
	printf %s "$ENGINE_PACKAGES" >"$stamp"
}

fetch_base() { # a root file system as a tar; false when it cannot be had
	[ -s "$cache/base.tar" ] && return 0
	say "making a base image of Debian $BASE_SUITE"
	mkdir -p "$work/mm"
	timeout 240 unshare --mount env TMPDIR="$work/mm" mmdebstrap --quiet --mode=root --variant=minbase \
		"$BASE_SUITE" "$cache/base.new.tar" "$(grep " $BASE_SUITE " "$cache/apt/sources.list")" >"$work/base.log" 2>&1 || return 1
	mv "$cache/base.new.tar" "$cache/base.tar"
}

# --- the node: namespaces, cgroups, dockerd

cgroup_dirs() { # cgroup_dirs PID: its directory in every hierarchy, as the machine sees it
	local controllers path
	while IFS=: read -r _ controllers path; do
		if [ -z "$controllers" ]; then
			echo "$cgroup2${path%/}"
		else
			controllers=${controllers#name=}
			echo "/sys/fs/cgroup/$controllers${path%/}"
		fi
	done <<<"$(cat "/proc/$1/cgroup")"
}

start_node() { # start_node NETWORK (machine's | own): a node with dockerd; false, with its last words, when one cannot run here
	# What an engine that was killed left: process ids, and containers that would be started again.
	rm -rf "$work/node.pid" "$work"/docker.* "$work/exec" "$cache/root/containers" "$cache/root/volumes"
	mkdir -p "$work/exec" "$cache/root"
	setpriv --pdeathsig KILL -- bash "$here/node.sh" "$1" "$work" "$cache" "$cgroup2" >"$work/engine.log" 2>&1 9>&- &
	node_job=$!
	until_true 10 test -s "$work/node.pid" || return 1
	node_pid=$(cat "$work/node.pid")
	until_true 60 docker version && return
	grep -E 'level=(error|fatal)|^[^t]' "$work/engine.log" | tail -n 3
	return 1
}

in_node() { # runs a command in the node: its cgroups, then its namespaces
	local dir
	(
		for dir in $(cgroup_dirs "$node_pid"); do echo $BASHPID >"$dir/cgroup.procs"; done
		exec nsenter -t "$node_pid" -m -n -p -u -i -C --wd="$PWD" -- "$@"
	)
}

stop_node() {
	local dir
	if [ -n "$node_job" ]; then
		kill -KILL ${node_pid:+"$node_pid"} "$node_job" 2>/dev/null || true
		wait "$node_job" 2>/dev/null || true
		node_job="" node_pid=""
	fi
	for dir in $(cgroup_dirs $$); do
		until_true 10 remove_cgroup "$dir/$(basename "$work")" || say "left behind: $dir/$(basename "$work")"
	done
}

remove_cgroup() { # with all below it; they empty a moment after their last process
	[ ! -d "$1" ] || find "$1" -depth -type d -exec rmdir {} \;
	[ ! -d "$1" ]
}
