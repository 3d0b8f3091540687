#!/usr/bin/env bash
# Installs what the tests need into .venv, and runs linting, types and tests. Arguments go to pytest.
#
#   bash tests/run.sh                          everything
#   bash tests/run.sh tests/search -k resume   a part of the tests
#
# Tests on real images take their folder from RLSEARCH_DATA and are skipped where it is unset.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

install_environment "$project/tests/requirements.lock"
cd "$project"

if [ -z "${RLSEARCH_DATA:-}" ] && [ -d "$project/../shared/data" ]; then
    RLSEARCH_DATA="$(cd "$project/../shared/data" && pwd)"
    export RLSEARCH_DATA
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# All tests: in two processes, file by file.
if [ $# -eq 0 ]; then
    set -- --numprocesses 2 --dist loadfile
fi
"$venv/bin/python" -m pytest "$@"
