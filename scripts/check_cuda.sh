#!/usr/bin/env bash
# The CUDA backend without a card: tests/device/cuda.rs on the emulated libraries of scripts/cuda_emulator. Needs g++ on Linux.
set -euo pipefail
cd "$(dirname "$0")/.."

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
emulator=scripts/cuda_emulator
g++ -O2 -std=c++17 -Wall -shared -fPIC -DHEADER="\"$PWD/$emulator/kernels.h\"" "$emulator/emulator.cpp" \
    -o "$dir/libcuda.so" -ldl
ln -s libcuda.so "$dir/libnvrtc.so"
ln -s libcuda.so "$dir/libcublas.so"
CUDA_EMULATOR_DIR=$dir LD_LIBRARY_PATH=$dir GQA2MLA_REQUIRE_CUDA=1 \
    cargo test --release --locked --features cuda --test devices "${@:-device::cuda}"
