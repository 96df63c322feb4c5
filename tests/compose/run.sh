#!/bin/bash
# Uses compose/ as a user would, on a container engine of its own: builds the image, starts the mesh,
# sends traffic through it, kills a container, ends the mesh, removes it. `make test-compose` calls it.
# Where no engine can run it says why and succeeds. V=1 shows what the commands print.
# shellcheck disable=SC2317  # most functions are called by `check`
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
python=$PWD/.venv/bin/python
cache=${PYKMESH_DOCKER_CACHE:-$HOME/.cache/pykmesh/docker}
cgroup2=$(awk '$3 == "cgroup2" {print $2; exit}' /proc/self/mounts)
passed=0 failed=0
VIP=10.96.0.20
# shellcheck source=tests/compose/engine.sh
. "$here/engine.sh"

say() { printf '%4d s  %s\n' $SECONDS "$*"; }

skip() {
	echo "skipped: $*"
	exit 0
}

end() {
	trap - EXIT
	stop_node
	rm -rf --one-file-system "$work"
}

check() { # check WHAT COMMAND...: counts it, and shows what it printed when it fails
	local what=$1
	shift
	if "$@" >"$work/output" 2>&1; then
		passed=$((passed + 1))
		say "passed: $what"
		[ -z "${V:-}" ] || cat "$work/output"
		return 0
	fi
	failed=$((failed + 1))
	say "FAILED: $what"
	tail -n 40 "$work/output"
	return 1
}

finish() {
	[ "$failed" = 0 ] || compose logs --tail 10 2>&1 | tail -n 100
	end
	echo "$passed passed, $failed failed"
	exit $((failed > 0))
}

# --- ways in

compose() { timeout 400 docker compose --project-directory compose "$@"; }
container() { docker inspect --format "$2" "$(compose ps --all --quiet "$1")"; }
pykmesh() { in_node timeout 30 "$python" -m pykmesh "$@"; }

in_pod() { # in_pod NAME COMMAND...
	local cgroup=$1_cgroup netns=$1_netns
	shift
	# shellcheck disable=SC2016  # the inner shell's
	in_node bash -c 'echo $$ >"$0/cgroup.procs"; exec nsenter --net="$1" -- "${@:2}"' "${!cgroup}" "${!netns}" "$@"
}

# --- what is checked

build() {
	docker image inspect "$BASE_IMAGE" >/dev/null || docker import "$cache/base.tar" "$BASE_IMAGE" || return 1
	BASE=$BASE_IMAGE BUILD_CA_FILE=${PIP_CERT:-${SSL_CERT_FILE:-/dev/null}} compose --progress plain build || return 1
	docker image prune --force && docker builder prune --force --keep-storage 1GB && docker image ls pykmesh
}

up() { compose --profile cli --profile otlp config --quiet && compose up --detach --wait --wait-timeout 120; }

is_bound() { # is_bound SERVICE USER BIT...: it has these capabilities (capability.h) and can get no others
	local service=$1 user=$2 mask=0 bit status
	for bit in "${@:3}"; do mask=$((mask | 1 << bit)); done
	status=$(in_node cat "/proc/$(container "$service" '{{.State.Pid}}')/status") || return 1
	echo "$service: $(grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' <<<"$status" | tr -s '\t\n' '  ')"
	mask=$(printf %016x "$mask")
	grep -q "^Uid:.$user\b" <<<"$status" && grep -q "^CapEff:.$mask$" <<<"$status" || return 1
	grep -q "^CapBnd:.$mask$" <<<"$status" && grep -q '^NoNewPrivs:.1$' <<<"$status"
}

privileges() {
	local sys_admin=21 bpf=39
	is_bound nats 65534 && is_bound control_plane 65534 && is_bound xds_client 65534 || return 1
	is_bound map_writer 0 "$bpf" && is_bound telemetry 0 "$bpf" && is_bound bpf_loader 0 "$sys_admin"
}

broker_is_closed() { # who has no password is told so
	local word
	word=$(in_node timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/15222; printf "CONNECT {}\r\nPING\r\n" >&3; cat <&3')
	echo "$word"
	grep -q 'Authorization Violation' <<<"$word"
}

start_pods() { # and tells the control plane where the endpoint is
	in_node "$python" -m tests.compose.pods "$work/pods" &
	until_true 20 test -s "$work/pods" || return 1
	# shellcheck source=/dev/null
	. "$work/pods"
	sed "s/172\.17\.0\.2/${web_address:?}/; s/10\.96\.0\.10/$VIP/; s/web/pod-web/g" compose/config/web.yaml >"$PYKMESH_CONFIG_DIR/pods.yaml"
}

enroll() { pykmesh enroll --cgroup "${client_cgroup:?}" --netns "${client_netns:?}"; }

containers() { # the example of the README, with the image's own server
	cp compose/config/web.yaml "$PYKMESH_CONFIG_DIR/"
	docker run --detach --name web pykmesh pykmesh.demo.endpoint web-1 --http 8080 || return 1
	docker run --detach --name client --entrypoint sleep pykmesh infinity || return 1
	compose run --rm pykmesh enroll --container "$(docker inspect --format '{{.Id}}' client)" || return 1
	until_true 20 container_answers || return 1
	compose run --rm pykmesh get endpoints --from bpf | grep 172.17.0.2:8080 || return 1
	docker rm --force web client
}

container_answers() {
	docker exec client python -c 'import urllib.request as r; print(r.urlopen("http://10.96.0.10", timeout=3).read())' |
		grep web-1
}

answers() { # the service's address leads to the endpoint
	[ "$(in_pod client curl --silent --show-error --max-time 3 "http://$VIP/")" = web-1 ]
}

kill_loader() { # docker starts it again; it adopts what is in the kernel
	in_node kill -KILL "$(container bpf_loader '{{.State.Pid}}')" || return 1
	until_true 60 restarted bpf_loader || return 1
	container bpf_loader 'restarts: {{.RestartCount}}, {{.State.Health.Status}}'
}

restarted() { container "$1" '{{.RestartCount}} {{.State.Health.Status}}' | grep -qx '[1-9][0-9]* healthy'; }

start_prober() { # a client that connects every 10 ms
	in_pod client "$python" -m pykmesh.demo.prober "$VIP" 80 >"$work/prober" &
	prober_job=$!
	until_true 10 test -s "$work/prober"
}

names() { # of services are answered in the pod, by the overlay, whichever server it asks
	export COMPOSE_FILE=compose/compose.yaml:compose/dns.yaml
	compose up --detach --wait --wait-timeout 120 || return 1
	is_bound dns_proxy 0 21 39 && is_bound bpf_loader 0 19 21 || return 1 # SYS_ADMIN, BPF; SYS_PTRACE
	cat >>"$PYKMESH_CONFIG_DIR/pods.yaml" <<-END || return 1
		---
		{apiVersion: v1, kind: Pod, metadata: {name: client}, status: {podIP: ${client_address:?}}}
	END
	until_true 20 name_is_answered
}

name_is_answered() {
	[ "$(in_pod client "$python" -c 'import dns.message as m, dns.query as q
print(q.udp(m.make_query("pod-web.default.svc.cluster.local", "A"), "10.77.0.1", timeout=1).answer[0][0])')" = $VIP ]
}

waypoint() { # of a service, from a container; and when who started it was killed (beside cgroup v1 docker ends it then)
	export COMPOSE_FILE=compose/compose.yaml:compose/dns.yaml:compose/waypoints.yaml PYKMESH_WAYPOINT_ADDRESS=172.17.0.1
	docker run --detach --name web pykmesh pykmesh.demo.endpoint web-1 --http 8080 || return 1
	docker run --detach --name client --entrypoint sleep pykmesh infinity || return 1
	compose up --detach --wait --wait-timeout 120 || return 1
	is_bound waypoint_mgr 0 19 || return 1 # SYS_PTRACE
	compose run --rm pykmesh enroll --container "$(docker inspect --format '{{.Id}}' client)" || return 1
	cat >"$PYKMESH_CONFIG_DIR/waypoint.yaml" <<-END || return 1
		apiVersion: gateway.networking.k8s.io/v1
		kind: Gateway
		metadata: {name: wp}
		spec: {gatewayClassName: pykmesh-waypoint}
		---
		apiVersion: gateway.networking.k8s.io/v1
		kind: HTTPRoute
		metadata: {name: web}
		spec:
		  parentRefs: [{group: "", kind: Service, name: web}]
		  rules:
		  - filters:
		    - {type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x-by-way-of, value: wp}]}}
		    backendRefs: [{name: web, port: 80}]
	END
	sed -i 's|{name: web, namespace: default}|{name: web, namespace: default, labels: {istio.io/use-waypoint: wp}}|' "$PYKMESH_CONFIG_DIR/web.yaml"
	until_true 40 came_by_way_of || {
		compose logs --tail 30 waypoint_mgr control_plane
		compose run --rm pykmesh waypoint status
		return 1
	}
	in_node kill -KILL "$(container waypoint_mgr '{{.State.Pid}}')" || return 1
	until_true 60 restarted waypoint_mgr || return 1
	until_true 40 came_by_way_of || return 1
	docker rm --force web client
}

came_by_way_of() {
	docker exec client python -c 'import urllib.request as r; print(r.urlopen("http://10.96.0.10", timeout=3).headers["x-by-way-of"])' |
		grep wp
}

none_failed() { # what the prober saw until now
	local pid
	for pid in $(in_node cat "$client_cgroup/cgroup.procs"); do in_node kill -TERM "$pid" || return 1; done
	wait "$prober_job"
	tail -n 1 "$work/prober"
	"$python" -c 'import json, sys; seen = json.loads(sys.argv[1]); sys.exit(seen["failed"] or seen["connections"] < 100)' \
		"$(tail -n 1 "$work/prober")"
}

down() { compose down && [ -z "$(docker ps --quiet)" ]; }

uninstall() {
	compose run --rm pykmesh uninstall || return 1
	! in_node test -e /sys/fs/bpf/pykmesh/default || return 1
	! answers
}

# --- in order

[ "$(id -u)" = 0 ] || skip "not root: an engine of its own needs namespaces and mounts"
[ -n "$cgroup2" ] || skip "no cgroup v2 is mounted"
unshare --mount --pid --net --cgroup --fork true 2>/dev/null || skip "namespaces cannot be made here"
[ -x "$python" ] || { echo "make setup first" >&2; exit 1; }
mkdir -p "$cache"
exec 9>"$cache/lock"
flock --wait 300 9 || { echo "another run holds $cache" >&2; exit 1; }

# One name for a cache: what an earlier run could not remove, because it was killed, is removed now.
work=${TMPDIR:-/tmp}/pykmesh-compose-$(cksum <<<"$cache" | cut -d' ' -f1)
trap end EXIT
trap 'exit 130' INT TERM
stop_node
rm -rf --one-file-system "$work"
mkdir -m 700 "$work"
fetch_engine 2>"$work/output" || skip "the engine's Debian packages cannot be had"
export PATH=$cache/engine/usr/sbin:$cache/engine/usr/bin:$PATH
fetch_base || skip "no base image: $(tail -n 1 "$work/base.log")"
export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/docker PYKMESH_CONFIG_DIR=$work/config
mkdir "$work/docker" "$work/config"
echo "# nothing yet" >"$work/config/empty.yaml" # an empty folder would be waited for
echo "{\"cliPluginsExtraDirs\": [\"$cache/engine/usr/libexec/docker/cli-plugins\"]}" >"$work/docker/config.json"

start_node machine >"$work/output" || skip "no engine runs here: $(tail -n 1 "$work/output")"
check "the image builds" build || finish
stop_node

check "the engine starts in a network of its own" start_node own || finish
# shellcheck disable=SC2016  # awk's
PYKMESH_CGROUP_ROOT=$(in_node awk '$3 == "cgroup2" {print $2; exit}' /proc/self/mounts)
export PYKMESH_CGROUP_ROOT
check "docker compose up: every container is healthy" up || finish
check "each has its capabilities and no others; those with none are nobody" privileges || true
check "the broker lets nobody in without a password" broker_is_closed || true
check "two pods start, one of them an endpoint" start_pods || finish
check "the other is enrolled through bpf_loader's socket" enroll || finish
check "the service's address answers" until_true 20 answers || finish
check "so it does from a container to a container, by the README" containers || true
check "a client connects every 10 ms" start_prober || finish
check "names of services are answered, with dns.yaml over it" names || true
check "a waypoint routes, with waypoints.yaml over it, also when waypoint_mgr was killed" waypoint || true
check "bpf_loader is killed, and is healthy again" kill_loader || true
check "docker compose down" down || finish
check "the service still answers: the kernel keeps it" answers || true
check "the client saw no failure, from before the kill until now" none_failed || true
check "pykmesh uninstall removes everything" uninstall || true
finish
