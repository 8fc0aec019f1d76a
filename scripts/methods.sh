#!/usr/bin/env bash
# Reproduces the tables and plots of docs/methods.md for one model: methods against budgets, attention-aware with gradient
# steps, and attention-aware without each of its steps. Needs a release build, a model folder, calibration text and test text.
#
#   scripts/methods.sh MODEL_DIR CALIBRATION_TEXT TEST_TEXT OUT_DIR [BUDGETS] [ABLATION_BUDGET]
#
# SAMPLES, ABLATION_SAMPLES: calibration windows of 256 tokens (default 128, and 32 for the ablation). WINDOWS: test windows
# of 1024 tokens (default 11). REFINE: gradient steps per layer (default 100; 0 leaves that table out).
set -euo pipefail
model=$1 calib=$2 text=$3 out=$4 budgets=${5:-67%,50%,33%} at=${6:-50%}
tool=${GQA2MLA:-$(dirname "$0")/../target/release/gqa2mla}
common=(--calib "$calib" --text "$text" --seq-len 1024 --every 4 --windows "${WINDOWS:-11}")
mkdir -p "$out"

"$tool" compare "$model" --kv-budget "$budgets" --methods transmla,care,attention-aware \
    --calib-samples "${SAMPLES:-128}" "${common[@]}" -o "$out/methods"
"$tool" compare "$model" --kv-budget "$at" --methods attention-aware --ablate \
    --calib-samples "${ABLATION_SAMPLES:-32}" "${common[@]}" -o "$out/ablation"
if [ "${REFINE:-100}" != 0 ]; then
    "$tool" compare "$model" --kv-budget "$budgets" --methods attention-aware --refine "${REFINE:-100}" \
        --calib-samples "${SAMPLES:-128}" "${common[@]}" -o "$out/refine"
fi
