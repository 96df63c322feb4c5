#!/bin/bash
# Builds etcd, kube-apiserver, istiod and istioctl from the Go modules that are locked beside this file, and
# gathers the CRDs, for tests/istio. `make istio-tools` calls it. Needs Go and 12 GB of disk meanwhile; no root.
#   $PYKMESH_ISTIO_TOOLS/kubernetes-VERSION/{etcd,kube-apiserver}
#   $PYKMESH_ISTIO_TOOLS/istio-VERSION/{istiod,istioctl,crds.yaml}
# A folder is there whole or not at all. What an interrupted run built goes on from there, in .build.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tools=${PYKMESH_ISTIO_TOOLS:-$HOME/.cache/pykmesh/istio-tools}

no_go() { # EX_UNAVAILABLE, for who wants to pass over it
	echo "istio-tools: $*: etcd, kube-apiserver and Istio are built with $wanted or newer (https://go.dev/dl)" >&2
	exit 69
}

say() { printf '%5d s  %s\n' $SECONDS "$*"; }

required() { awk -v module="$2" '$1 == "require" {$0 = $2 " " $3} $1 == module {print $2}' "$here/$1/go.mod"; }

need_go() { # the one that the modules ask for, or a newer one
	local wanted found
	wanted=$(awk '$1 == "go" {print $2}' "$here"/*/go.mod | sort -V | tail -n 1)
	command -v go >/dev/null || no_go "Go is missing"
	found=$(cd "$here/istio" && go env GOVERSION 2>&1) || no_go "$(tail -n 1 <<<"$found")"
	found=${found#go}
	[ "$(printf '%s\n' "$wanted" "${found%% *}" | sort -V | head -n 1)" = "$wanted" ] || no_go "Go $found is too old"
}

build() { # build MODULE FILE PACKAGE LDFLAGS [FLAG...]: one command, into the folder in the making
	say "building $2"
	(cd "$here/$1" && go build -ldflags "-s -w $4" "${@:5}" -o "$work/$1/$2" "$3")
}

folder_of() { (cd "$here/$1" && go list -m -f '{{.Dir}}' "$2"); }

build_kubernetes() {
	local set=k8s.io/component-base/version number=${kubernetes#v}
	build kubernetes kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver \
		"-X $set.gitVersion=$kubernetes -X $set.gitMajor=${number%%.*} -X $set.gitMinor=$(cut -d. -f2 <<<"$number")"
	build kubernetes etcd go.etcd.io/etcd/server/v3 "" # the one that this Kubernetes names
}

build_istio() { # with the tags of Istio's own builds, and the CRDs of the Gateway API that it was made for
	local folder gateway_api file version
	folder=$(folder_of istio istio.io/istio) gateway_api=$(folder_of istio sigs.k8s.io/gateway-api)
	version="-X istio.io/istio/pkg/version.buildVersion=$(cat "$folder/VERSION")-${istio##*-}"
	build istio istiod istio.io/istio/pilot/cmd/pilot-discovery "$version" -tags vtprotobuf,disable_pgv
	build istio istioctl istio.io/istio/istioctl/cmd/istioctl "$version" -tags vtprotobuf,disable_pgv
	for file in "$folder/manifests/charts/base/files/crd-all.gen.yaml" \
		"$gateway_api"/config/crd/standard/gateway.networking.k8s.io_*.yaml; do
		echo ---
		cat "$file"
	done >"$work/istio/crds.yaml"
}

make_whole() { # make_whole MODULE VERSION: builds it unless it is there
	[ ! -d "$tools/$1-$2" ] || return 0
	rm -rf "${work:?}/$1"
	mkdir "$work/$1"
	say "downloading the modules of $1"
	(cd "$here/$1" && go mod download)
	"build_$1"
	mv "$work/$1" "$tools/$1-$2"
}

kubernetes=$(required kubernetes k8s.io/kubernetes)
istio=$(required istio istio.io/istio)
if [ -d "$tools/kubernetes-$kubernetes" ] && [ -d "$tools/istio-$istio" ]; then
	echo "istio-tools: kubernetes $kubernetes and istio $istio are there, in $tools"
	exit 0
fi
need_go
mkdir -p "$tools/.build"
tools=$(cd "$tools" && pwd) work=$tools/.build
exec 9>"$tools/.lock"
flock --nonblock 9 || { say "another build runs: waiting for it" && flock 9; }
mkdir -p "$work"
export GOCACHE=$work/cache GOMODCACHE=$work/modules GOFLAGS="-modcacherw -buildvcs=false" CGO_ENABLED=0
make_whole kubernetes "$kubernetes"
make_whole istio "$istio"
say "dropping what was only needed to build: $(du -sh "$work" | cut -f1)"
rm -rf "$work"
say "kept: $(du -sh "$tools/kubernetes-$kubernetes" "$tools/istio-$istio" | tr '\t\n' ' ;')"
