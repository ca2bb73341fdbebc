#!/usr/bin/env bash
# Build wheel and sdist, check what is in them, install the wheel without extras in a bare venv, run the quickstart there.
# Usage: benchmarks/package.sh FOLDER   (FOLDER is kept; PYTHON=python3.11 names another Python)
set -euo pipefail
folder=$(realpath -m "${1:?name a folder for builds and environments}")
cd "$(dirname "$0")/.."
mkdir -p "$folder"
"${PYTHON:-python3}" -m venv "$folder/builder"
"$folder/builder/bin/pip" install -q build
rm -rf "$folder/dist"
"$folder/builder/bin/python" -m build -o "$folder/dist" . > "$folder/build.log" || { tail "$folder/build.log"; exit 1; }
"$folder/builder/bin/python" .ci/contents.py "$folder/dist"
"${PYTHON:-python3}" -m venv "$folder/bare"
"$folder/bare/bin/pip" install -q "$folder"/dist/*.whl
cd "$folder"
unset PYTHONPATH
bare/bin/gmprobe --version
bare/bin/gmprobe doctor
bare/bin/gmprobe quickstart
