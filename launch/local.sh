#!/usr/bin/env bash
# Installs rlsearch into .venv and runs a search on this machine: on its GPU where there is one, else on its CPUs.
# Then it exports the knee of the front.
#
#   bash launch/local.sh                                          the 40-trial search on the digits images
#   bash launch/local.sh search_spaces/cifar10_resnet20.yaml --run-dir runs/cifar10 --trials 20
#
# Arguments are those of `rlsearch search`. A run folder that holds a search already is gone on with, by
# `rlsearch resume`: a finished one only shows its front again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_environment "$project/requirements.lock"
export PATH="$venv/bin:$PATH"

space="$project/search_spaces/digits_resnet32.yaml"
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
    space="$1"
    shift
fi
run_dir="$project/runs/$(basename "${space%.*}")"
arguments=()
for argument in "$@"; do
    if [ "$argument" = --help ]; then
        exec rlsearch search --help
    fi
done
while [ $# -gt 0 ]; do
    case "$1" in
        --run-dir) run_dir="${2:?--run-dir needs a folder}"; shift 2 ;;
        --run-dir=*) run_dir="${1#*=}"; shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done
mkdir -p "$(dirname "$run_dir")"

if [ -e "$run_dir/study.db" ] || [ -e "$run_dir/study.json" ]; then
    echo "$run_dir holds a search already: going on with it"
    rlsearch resume "$run_dir" ${arguments[@]+"${arguments[@]}"}
else
    rlsearch search "$space" --run-dir "$run_dir" ${arguments[@]+"${arguments[@]}"}
fi

knee="$(rlsearch pareto "$run_dir" --json | python -c 'import json, sys; print(json.load(sys.stdin)["selected"]["trial"])')"
out="$run_dir/exported/trial-$knee"
if [ -e "$out" ]; then
    echo "the knee, trial $knee, is exported already: $out"
else
    rlsearch export "$run_dir" --trial "$knee" --out "$out"
fi
echo
echo "train it at full length:"
echo "  source $venv/bin/activate"
echo "  rlsearch train $out/policy.json --epochs 30 --out $run_dir/trained"
