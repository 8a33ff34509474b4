#!/bin/sh
# Resolves the tested set of versions again: this package's own, its developers', and each runtime's environment.
# The files hold no index and no address, so they work with whatever package index is configured.
set -eu
cd "$(dirname "$0")/.."
compile() {
    uv pip compile --quiet --no-annotate --no-header --no-emit-index-url --no-emit-find-links --python-version 3.11 "$@"
}
compile --universal pyproject.toml requirements/tested.in --extra onnx -o requirements/user.txt
compile --universal pyproject.toml requirements/tested.in --extra modelscope --extra onnx --group dev -o requirements/developer.txt
