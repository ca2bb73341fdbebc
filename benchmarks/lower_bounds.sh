#!/usr/bin/env bash
# Install gm_probe at the lowest releases that pyproject.toml allows and run the tests there.
# Usage: benchmarks/lower_bounds.sh FOLDER [PYTEST ARGUMENT...]   (FOLDER is kept; PYTHON=python3.11 names another)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?name a folder for the environment}
shift
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" - > "$folder/lowest.txt" <<'PYTHON'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
print(*(requirement.replace(">=", "==") for requirement in needed), sep="\n")
PYTHON
cat "$folder/lowest.txt"
"$folder/bin/pip" install -q -r "$folder/lowest.txt" -e .
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$folder/bin/python" -m pytest -q -p no:cacheprovider -W ignore::DeprecationWarning -W ignore::FutureWarning "$@"
