# Sourced by launch/local.sh and tests/run.sh: makes .venv beside the README, once, and brings it up to the lock file.
#
#   install_environment LOCK    installs what LOCK pins, by hash, and rlsearch itself; does nothing when LOCK has not changed
#
# PYTHON names the interpreter that makes .venv (3.11 or newer); by default the first that is found.

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$project/.venv"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "rlsearch needs Python 3.11 or newer, with venv; set PYTHON to it" >&2
    return 1
}

install_environment() {
    local lock="$1" stamp="$venv/installed-$(basename "$(dirname "$1")").sum" sum python
    sum="$(cat "$lock" "$project/pyproject.toml" | cksum)"
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ]; then
        return
    fi
    if [ ! -x "$venv/bin/python" ]; then
        python="$(find_python)"
        echo "making $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    echo "installing the packages of ${lock#"$project"/} (several GB the first time: PyTorch brings its GPU libraries)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$project"
    echo "$sum" > "$stamp"
}
