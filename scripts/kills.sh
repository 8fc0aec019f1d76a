#!/usr/bin/env bash
# Kills conversions at random moments, and checks after each that the output is absent or whole and that the run which goes
# on with it ends with the bytes of a run that nothing stopped.
#
# usage: scripts/kills.sh MODEL [KILLS] [SEED] [CONVERT OPTION...]
set -euo pipefail
binary=${GQA2MLA:-$(dirname "$0")/../target/release/gqa2mla}
model=${1:?usage: $0 MODEL [KILLS] [SEED] [CONVERT OPTION...]}
kills=${2:-100}
RANDOM=${3:-1}
shift $(($# < 3 ? $# : 3))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

now() { date +%s%N; }
run() { "$binary" convert "$model" -o "$work/$1" -q "${@:2}" >/dev/null 2>"$work/log"; }
fail() { echo "FAILED: $*"; cat "$work/log"; exit 1; }

start=$(now)
run whole "$@" || fail "the run that nothing stops"
length=$((($(now) - start) / 1000000))
echo "an undisturbed run takes $length ms"

killed=0 outputs=0 resumed=0
while ((killed < kills)); do
    "$binary" convert "$model" -o "$work/out" -q "$@" --resume >/dev/null 2>"$work/log" &
    pid=$!
    # Up to a quarter of a run each time, so that most outputs are made in several pieces.
    sleep "$(printf '%d.%03d' $((w = RANDOM * 32768 + RANDOM, w = w % (length / 4), w / 1000)) $((w % 1000)))"
    if kill -KILL "$pid" 2>/dev/null; then killed=$((killed + 1)); fi
    wait "$pid" 2>/dev/null || true
    if ls "$work"/.out.partial-*/journal >/dev/null 2>&1; then resumed=$((resumed + 1)); fi
    if [[ -e $work/out ]]; then
        "$binary" verify-files "$work/out" >/dev/null || fail "an output that is not whole after kill $killed"
        cmp -s "$work/out/manifest.json" "$work/whole/manifest.json" || fail "other bytes after kill $killed"
        outputs=$((outputs + 1))
        rm -rf "$work/out"
    fi
done
run out "$@" --resume || fail "the last run"
cmp -s "$work/out/manifest.json" "$work/whole/manifest.json" || fail "other bytes at the end"
outputs=$((outputs + 1))
left=$(find "$work" -maxdepth 1 -name '.out*' | wc -l)
echo "$killed kills, $resumed of them left work to go on with, $outputs outputs, all with the same bytes; $left left over"
