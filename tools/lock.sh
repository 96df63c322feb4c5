#!/bin/sh
# Locks the dependencies anew, with hashes and without addresses. Needs uv on the PATH.
set -eu
cd "$(dirname "$0")/.."
unset PIP_FIND_LINKS UV_FIND_LINKS 2>/dev/null || true
lock() { uv pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate "$@" pyproject.toml; }
lock --all-extras --output-file requirements/dev.txt
lock --extra node --output-file requirements/run.txt
