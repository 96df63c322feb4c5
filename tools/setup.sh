#!/bin/sh
# Sets a Debian 12 machine up: system packages that are missing, and the locked Python environment.
# Usage: setup.sh PYTHON VENV
set -eu
python=$1 venv=$2
packages=""

need() { # need COMMAND-OR-FILE PACKAGE
	command -v "$1" >/dev/null 2>&1 || [ -e "$1" ] || packages="$packages $2"
}

need clang clang
need bpftool bpftool
need /usr/include/bpf/bpf_helpers.h libbpf-dev
need ip iproute2
need curl curl
need mount mount
"$python" -c 'import venv, ensurepip' 2>/dev/null || packages="$packages python3-venv"

if [ -n "$packages" ]; then
	[ "$(id -u)" = 0 ] || { echo "setup: not root: install$packages, then run this again" >&2; exit 1; }
	command -v apt-get >/dev/null || { echo "setup: no apt-get: install$packages by hand" >&2; exit 1; }
	echo "setup: installing Debian packages:$packages"
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	{ echo "setup: $python is older than 3.11" >&2; exit 1; }
echo "setup: installing the locked Python packages into $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
touch "$venv/.ready"
