"""Utility-driven speculative decoding for mixtures of experts: draft where it pays.

The plugin for vLLM is `moecascade.vllm.Scheduler`. What stands here is for those who write policies
of their own: the base class `Policy`, `register` to give a class a name, `create` to make one.

    errors < core < telemetry < replay, vllm, localmodel < serving < evaluation < cli

is the order of the packages: each imports only from those before it (tests/test_layers.py).
Importing this package imports neither vLLM nor torch.
"""

from importlib import metadata

from moecascade.core.policy import Policy
from moecascade.core.registry import create, register

__all__ = ["Policy", "__version__", "create", "register"]

try:
    __version__ = metadata.version("moecascade")
except metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
