"""The vLLM plugin: ``vllm serve MODEL --scheduler-cls moecascade.vllm.Scheduler``.

Importing this package imports nothing of vLLM; asking it for `Scheduler` does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecascade.vllm.scheduler import Scheduler

__all__ = ["Scheduler"]


def __getattr__(name: str) -> Any:
    if name == "Scheduler":
        from moecascade.vllm.support import check_version

        check_version()
        from moecascade.vllm.scheduler import Scheduler

        return Scheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
