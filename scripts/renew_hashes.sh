#!/usr/bin/env bash
# Writes tests/convert/hashes.tsv anew: the SHA-256 of every file that each method writes for each fixture and target.
# With the path of a binary, of what that one writes (it made the first table, from the commit before anything moved).
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $# -gt 0 ]]; then
    GQA2MLA_BIN=$(realpath "$1")
    export GQA2MLA_BIN
fi
GQA2MLA_RENEW_HASHES=1 cargo test --release --test suite convert::bytes
git diff --stat -- tests/convert/hashes.tsv
