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

# A studies' database is tested on a real server: of the system's package, which CI installs where it is missing.
if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null \
    && ! compgen -G "/usr/lib/postgresql/*/bin/initdb" > /dev/null; then
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql) \
        || echo "PostgreSQL could not be installed: its tests are skipped"
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
if [ $# -gt 0 ]; then
    "$venv/bin/python" -m pytest "$@"
else
    # In two processes, file by file, of one thread each: two would wait for each other on two cores. Then those that
    # start Ray, which takes all cores, alone.
    OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -m "not cluster" --numprocesses 2 --dist loadfile --durations 10
    "$venv/bin/python" -m pytest -m cluster --durations 10
fi
