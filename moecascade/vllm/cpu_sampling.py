"""Repairs of CPU builds of vLLM 0.32: two of how they sample, one of how they start a second time.

Builds for GPUs are not concerned.

vLLM calls `repair_cpu_sampling` in each of its processes (entry point group
``vllm.general_plugins``). Each repair leaves alone what it does not know, so it is gone when vLLM
mends the fault.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moecascade.vllm.support import logger


def repair_cpu_sampling() -> None:
    """Have a CPU build of vLLM sample drafts rightly and survive seeds. It must not raise."""
    try:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _spread_temperatures()
            _spare_generators(type(current_platform))
    except Exception:  # noqa: BLE001 -- it must not raise
        logger.warning(
            "moecascade could not check how this CPU build of vLLM samples with drafts; "
            "compare answers at a temperature above 0 with those under policy 'off'",
            exc_info=True,
        )


def _spread_temperatures() -> None:
    """Let vLLM verify sampled drafts at the request's own temperature.

    To verify drafts, vLLM spreads each request's temperature, top-k and top-p over them. In the CPU
    build of 0.32 that is a C++ kernel for whole numbers; temperatures are handed to it as a
    converted copy, which is then dropped, so drafts are verified at whatever was in memory: of two
    drafts the second is never accepted, and the text is sampled from another distribution than
    without speculation. The kernel is registered after this.
    """
    from vllm.utils import cpu_triton_utils

    theirs = cpu_triton_utils._expand_kernel_impl  # noqa: SLF001 -- what is repaired
    if getattr(theirs, "by_moecascade", False):
        return

    def expand(
        output: Any, values: Any, ends: Any, replace: Any, by: Any, *rest: Any, **more: Any
    ) -> None:
        import torch

        if output.dtype == torch.int64:
            theirs(output, values, ends, replace, by, *rest, **more)
            return
        lengths = torch.diff(ends, prepend=ends.new_zeros(1))
        replaced = torch.where(values == replace, torch.full_like(values, by), values)
        output.copy_(torch.repeat_interleave(replaced, lengths))

    expand.by_moecascade = True  # type: ignore[attr-defined]
    cpu_triton_utils._expand_kernel_impl = expand  # noqa: SLF001


@contextmanager
def _without_llvmlite() -> Iterator[None]:
    """Let vLLM look through the attributes of all modules without stumbling.

    It does so where it makes a worker in this process. One of llvmlite's modules has an object that
    answers to every name; numba has imported it where a policy was made before, or an engine.
    """
    name = "llvmlite.binding.ffi"
    hidden = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules[name] = hidden


def _spare_generators(platform: Any) -> None:
    """Let the engine survive a request with a seed whose prompt is computed in several steps.

    After each of these steps vLLM draws a token from the request's generator, drops it, and takes
    the generator back by an offset (`GPUModelRunner._bookkeeping_sync`). CPU generators have none,
    so the engine dies. Here it draws without the generator until the prompt is complete.

    The runner is looked at where vLLM makes a worker: importing it elsewhere takes a second.
    """
    theirs = platform.register_triton_kernel_overrides

    def register() -> None:
        with _without_llvmlite():
            theirs()
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        sample = CPUModelRunner.sample_tokens
        if (
            "set_offset" not in CPUModelRunner._bookkeeping_sync.__code__.co_names  # noqa: SLF001
            or getattr(sample, "by_moecascade", False)
        ):
            return

        def sample_tokens(runner: Any, *args: Any, **more: Any) -> Any:
            generators, unfinished = runner.input_batch.generators, runner.discard_request_mask.np
            spared = {i: generators.pop(i) for i in list(generators) if unfinished[i]}
            try:
                return sample(runner, *args, **more)
            finally:
                generators.update(spared)

        sample_tokens.by_moecascade = True  # type: ignore[attr-defined]
        CPUModelRunner.sample_tokens = sample_tokens

    platform.register_triton_kernel_overrides = staticmethod(register)
