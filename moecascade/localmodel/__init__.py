"""Real mixture-of-experts models, made on this machine: `ensure("local")` returns a folder."""

from moecascade.localmodel.build import cache_folder, check_installed, ensure, path_of, state
from moecascade.localmodel.catalogue import CATALOGUE, LocalModel, find, names

__all__ = [
    "CATALOGUE",
    "LocalModel",
    "cache_folder",
    "check_installed",
    "ensure",
    "find",
    "names",
    "path_of",
    "state",
]
