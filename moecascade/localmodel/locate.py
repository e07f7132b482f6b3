"""From what a person writes for a model to what vLLM is to serve."""

from __future__ import annotations

import sys
from pathlib import Path

from moecascade.errors import ConfigError, SetupError, nearest
from moecascade.localmodel.build import ensure, path_of
from moecascade.localmodel.catalogue import names

DRAFTERS = {"ngram": "", "draft": "draft_model", "eagle": "eagle"}
"""What drafts for a local model: its name here, and vLLM's method; a search needs no model."""


def drafter(name: str, model: str) -> dict[str, str]:
    """Return a drafter for a local model as vLLM's speculative configuration has it, built.

    Args:
        name: One of `DRAFTERS`, but for the search.
        model: What it is to draft for.

    Raises:
        ConfigError: An unknown drafter, or a model that is not local.
        SetupError: It cannot be built.
    """
    if name not in DRAFTERS:
        raise ConfigError(
            f"unknown drafter {name!r}{nearest(name, DRAFTERS)}; allowed: {', '.join(DRAFTERS)}"
        )
    if model not in names():
        raise ConfigError(
            f"the drafter {name!r} is made for the local models, not for {model!r}; choose its own "
            "with --speculative-config"
        )
    return {"method": DRAFTERS[name], "model": find_model(name)[0]}


def _tell(what: str) -> None:
    print(f"local model: {what}", file=sys.stderr, flush=True)


def find_model(model: str, *, build: bool = True) -> tuple[str, str | None]:
    """Return what to serve, a folder or a hub's name, and its name if it is a local model.

    Args:
        model: What the user wrote.
        build: Build a local model that is not there yet.

    Raises:
        ConfigError: A misspelt local model.
        SetupError: The folder does not exist or holds no model.
    """
    if model in names():
        if not build:
            return str(path_of(model)), model
        return str(ensure(model, progress=_tell)), model
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "params.json").is_file():
            raise SetupError(
                f"the folder {model!r} holds no model (no config.json); give a model's folder"
            )
        return str(folder), None
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        if not folder.exists():  # a single file (GGUF) is vLLM's to judge
            raise SetupError(
                f"there is no model folder {model!r}; give one that exists, a name on the hub "
                "(owner/name), or 'local' for the local model"
            )
        return str(folder), None
    if "/" not in model and (hint := nearest(model, names())):
        raise ConfigError(
            f"unknown model {model!r}{hint}; local models: {', '.join(names())}; "
            "models on the hub are named owner/name"
        )
    return model, None
