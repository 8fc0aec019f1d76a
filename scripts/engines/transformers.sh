#!/usr/bin/env bash
# Runs the checks of `hf-remote` and of tokenizers in every pinned version of transformers, one environment for each.
#
#   scripts/engines/transformers.sh                       # the versions of transformers.txt, about ten minutes on two cores
#   scripts/engines/transformers.sh 5.24.0 newest         # these; `newest` is whatever the registry has
#   TOKENIZERS="DIR DIR" scripts/engines/transformers.sh  # the tokenizers of these model folders too
#
# Needs a release build, python3, and a registry the first time. Environments are kept in ENGINES_DIR (default
# target/engines): torch and what else is large once, below all of them. Exit 1 when a check does not hold.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
dir=${ENGINES_DIR:-$root/target/engines}
binary=${GQA2MLA:-$root/target/release/gqa2mla}
mkdir -p "$dir"
[[ -x $binary ]] || { echo "no $binary: run \`cargo build --release\` first" >&2; exit 2; }

packages() { sed -n "s/^$1 //p" "$here/transformers.txt"; }
base=$dir/base
if [[ ! -e $base/ready ]]; then
    python3 -m venv "$base"
    # shellcheck disable=SC2046
    "$base/bin/python" -m pip install --quiet $(packages base)
    touch "$base/ready"
fi
site=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# An environment of its own for a version, which sees the packages of the one below after its own.
environment() {
    local env=$dir/$1 wanted=transformers==$1
    [[ $1 == newest ]] && wanted=transformers
    if [[ ! -e $env/ready || $1 == newest ]]; then
        [[ -e $env ]] || python3 -m venv --without-pip "$env"
        echo "$site" >"$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
        # shellcheck disable=SC2046
        "$base/bin/python" -m pip --python "$env/bin/python" install --quiet --upgrade "$wanted" $(packages each)
        touch "$env/ready"
    fi
}

versions=("$@")
[[ ${#versions[@]} -gt 0 ]] || mapfile -t versions < <(sed -n 's/^transformers==//p' "$here/transformers.txt")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
for version in "${versions[@]}"; do
    environment "$version"
    printf '\n== transformers %s\n' "$version"
    # What the code of earlier runs was copied to is not shared: a stale copy would be checked in place of this one.
    export HF_MODULES_CACHE=$work/modules-$version
    "$dir/$version/bin/python" "$here/check_remote.py" --binary "$binary" --work "$work/remote" \
        --json "$dir/remote-$version.json" || status=1
    # shellcheck disable=SC2086
    "$dir/$version/bin/python" "$here/check_tokenizers.py" --binary "$binary" --work "$work/tokenizers" \
        ${TOKENIZERS:-} || status=1
done
printf '\n'
files=()
for version in "${versions[@]}"; do files+=("$dir/remote-$version.json"); done
"$dir/${versions[0]}/bin/python" "$here/check_remote.py" --table "${files[@]}"
exit $status
