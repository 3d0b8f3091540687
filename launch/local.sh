#!/usr/bin/env bash
# Installs rlsearch into .venv and runs a search on this machine: on its GPU where there is one, else on its CPUs.
#
#   bash launch/local.sh                                          the 40-trial search on the digits images
#   bash launch/local.sh search_spaces/cifar10_resnet20.yaml --run-dir runs/cifar10 --trials 20
#
# Arguments are those of `rlsearch search`. Called again with the same run folder, it goes on with that search.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_environment "$project/requirements.lock"

space="$project/search_spaces/digits_resnet32.yaml"
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
    space="$1"
    shift
fi
run_dir="$project/runs/$(basename "${space%.*}")"
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --run-dir) run_dir="${2:?--run-dir needs a folder}"; shift 2 ;;
        --run-dir=*) run_dir="${1#*=}"; shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done
mkdir -p "$(dirname "$run_dir")"

exec "$venv/bin/rlsearch" search "$space" --run-dir "$run_dir" ${arguments[@]+"${arguments[@]}"}
