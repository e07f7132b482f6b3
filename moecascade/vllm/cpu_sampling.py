"""A repair of how CPU builds of vLLM 0.32 verify sampled drafts."""

from __future__ import annotations

from typing import Any

from moecascade.vllm.support import logger


def repair_cpu_sampling() -> None:
    """Let a CPU build of vLLM verify sampled drafts at the request's own temperature.

    To verify drafts, vLLM spreads each request's temperature, top-k and top-p over them. In the CPU
    build of 0.32 that is a C++ kernel for whole numbers; temperatures are handed to it as a
    converted copy, which is then dropped, so drafts are verified at whatever was in memory: of two
    drafts the second is never accepted, and the text is sampled from another distribution than
    without speculation. Builds for GPUs are not concerned.

    vLLM calls this in each of its processes (entry point group ``vllm.general_plugins``), before it
    registers that kernel. It must not raise.
    """
    try:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
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
    except Exception:  # noqa: BLE001 -- it must not raise
        logger.warning(
            "moecascade could not check how this CPU build of vLLM samples with drafts; "
            "compare answers at a temperature above 0 with those under policy 'off'",
            exc_info=True,
        )
