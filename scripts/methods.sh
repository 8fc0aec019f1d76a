#!/usr/bin/env bash
# Reproduces the tables of docs/methods.md for one model: methods against budgets, then attention-aware without each of
# its steps. Needs a release build, a model folder, calibration text and test text.
#
#   scripts/methods.sh MODEL_DIR CALIBRATION_TEXT TEST_TEXT OUT_DIR [BUDGETS] [ABLATION_BUDGET]
set -euo pipefail
model=$1 calib=$2 text=$3 out=$4 budgets=${5:-67%,50%,33%} at=${6:-50%}
tool=${GQA2MLA:-$(dirname "$0")/../target/release/gqa2mla}
mkdir -p "$out"

"$tool" compare "$model" --kv-budget "$budgets" --methods transmla,care,attention-aware \
    --calib "$calib" --text "$text" --seq-len 1024 --every 4 --windows 11 -o "$out/compare"

perplexity() {
    "$tool" eval "$1" --text "$text" --seq-len 1024 --every 4 --windows 11 --json |
        sed -n 's/.*"perplexity": *\([0-9.]*\).*/\1/p'
}
printf 'without\tperplexity\n' | tee "$out/ablation.tsv"
for step in none phase query-weight centring metric value-refit output-refit converted-stream; do
    options=()
    [ "$step" = none ] || options=(--without "$step")
    "$tool" convert "$model" -o "$out/model" --overwrite --quiet --dtype f32 --kv-budget "$at" --calib "$calib" \
        "${options[@]}" >"$out/log"
    printf '%s\t%s\n' "$step" "$(perplexity "$out/model")" | tee -a "$out/ablation.tsv"
done
rm -rf "$out/model"
