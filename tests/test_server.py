"""Servers as child processes: whatever happens to us or to them, nothing is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from moecascade.errors import SetupError
from moecascade.replay import player
from moecascade.serving import server
from moecascade.serving.command import Launch
from moecascade.serving.server import Server
from moecascade.telemetry import traces

PATIENCE = 60.0
PATIENT = "import moecascade.serving.supervisor as s; s.main()"
QUICK = (
    "import moecascade.serving.supervisor as s; "
    "s.GRACE_SECONDS = s.ORPHAN_GRACE_SECONDS = 0.5; s.main()"
)

STUBBORN = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(600)
"""
FAMILY = f"""
    import subprocess, sys, time
    child = "import os, subprocess, sys\\nos.setsid()\\n" + {STUBBORN.replace("    ", "")!r}
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', " + repr(child) + "])"
    subprocess.run([sys.executable, "-c", orphan], check=True)
    subprocess.Popen([sys.executable, "-c", child])
    time.sleep(600)
"""
"""Has a child that ignores SIGTERM and left the session, and a grandchild whose parent is gone."""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable that all processes of this test inherit, and nobody else has."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)  # conftest's, for engines inside the test process
    value = uuid.uuid4().hex
    monkeypatch.setenv("MOECASCADE_TEST", value)
    return value


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get("MOECASCADE_TEST") == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def family_ready(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2


def python(script: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script)]


def supervised(script: str, supervisor: str = QUICK) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", supervisor, *python(script)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def close_lifeline(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    process.stdin.close()


def head_ready(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
    ],
)
def test_the_supervisor_ends_as_its_head_does(script: str, status: int):
    with supervised(script) as process:
        assert process.wait(PATIENCE) == status


def test_closing_the_lifeline_ends_the_whole_family(mark: str):
    with supervised(FAMILY) as process:
        family_ready(process)
        assert len(marked(mark)) == 4  # supervisor, head, child, orphan
        close_lifeline(process)
        process.wait(PATIENCE)
    assert marked(mark) == []


def test_a_head_that_dies_badly_leaves_no_orphans(mark: str):
    with supervised(FAMILY) as process:
        family_ready(process)
        (head,) = [
            p for p in psutil.Process(process.pid).children() if "orphan" in str(p.cmdline())
        ]
        head.kill()
        assert process.wait(PATIENCE) == 128 + 9
    assert marked(mark) == []


def test_the_family_ends_when_we_are_killed(mark: str):
    starter = f"""
        import subprocess, sys, time
        command = [sys.executable, "-c", {QUICK!r}, *{python(FAMILY)!r}]
        subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        time.sleep(600)
    """
    with subprocess.Popen(python(starter), stdout=subprocess.PIPE) as process:
        family_ready(process)
        assert len(marked(mark)) == 5  # and the starter
        process.kill()
    wait_until(lambda: marked(mark) == [])


def test_a_head_that_ignores_sigterm_is_killed(mark: str):
    with supervised(STUBBORN) as process:
        head_ready(process)
        close_lifeline(process)
        assert process.wait(PATIENCE) == 128 + 9
    assert marked(mark) == []


POLITE = """
    import signal, sys, time
    signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(6))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_head_may_end_in_its_own_way_when_the_lifeline_closes():
    with supervised(POLITE, PATIENT) as process:
        head_ready(process)
        close_lifeline(process)
        assert process.wait(PATIENCE) == 6


def test_signals_are_passed_on_to_the_head():
    with supervised(POLITE, PATIENT) as process:
        head_ready(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 7


def command(script: str) -> Launch:
    return Launch(tuple(python(script)), {}, "none", "127.0.0.1", server.free_port())


def test_a_server_that_fails_to_start_is_reported_with_the_end_of_its_log(
    tmp_path: Path, mark: str
):
    failing = "print('loading', flush=True); raise MemoryError('no room for the model')"
    with (
        Server(command(failing), tmp_path / "server.log") as running,
        pytest.raises(SetupError, match=r"no room for the model(.|\n)*moecascade doctor"),
    ):
        running.wait_ready(PATIENCE)
    assert marked(mark) == []


def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path: Path, mark: str):
    said: list[str] = []
    with Server(command(STUBBORN.replace("SIGTERM", "SIGUSR1")), tmp_path / "log") as running:
        wait_until(lambda: "ready" in running.log_tail(1))
        with pytest.raises(SetupError, match="did not answer within 1 s"):
            running.wait_ready(1, tell=said.append)
    assert said[-1] == "ready"  # what it printed last
    assert marked(mark) == []


def test_a_busy_port_is_refused_before_anything_starts(tmp_path: Path, mark: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = Launch(("false",), {}, "none", "127.0.0.1", port)
        with pytest.raises(SetupError, match=f"port {port} .*--port"), Server(busy, tmp_path / "l"):
            pass
    assert marked(mark) == []


def test_a_port_out_of_range_is_refused():
    with pytest.raises(SetupError, match="port 70000"):
        server.check_port("127.0.0.1", 70000)


REFUSES = """
    import sys
    print("to standard output", flush=True)
    print("(APIServer pid=7) Traceback (most recent call last):", file=sys.stderr)
    print("(APIServer pid=7)   File 'x.py', line 1, in f", file=sys.stderr)
    print("(APIServer pid=7) KeyError: 'first'", file=sys.stderr)
    print("", file=sys.stderr, flush=True)
    raise ValueError("Consider more") from None
"""


def test_why_the_server_would_not_start_is_said_once_more_at_the_end(
    mark: str,
):
    with pytest.raises(SetupError) as error:
        server.run(command(REFUSES))
    assert str(error.value) == "vLLM ended with this error: ValueError: Consider more"
    assert marked(mark) == []


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(1)", 1),  # without a traceback: it has said why
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
    ],
)
def test_serving_ends_as_the_server_does(script: str, status: int):
    assert server.run(command(script)) == status


def test_what_the_server_prints_is_passed_through_whole():
    """In a process of its own: both streams are then as in a terminal or a pipe."""
    loud = "import os; os.write(2, bytes(range(256)) * 1000); os.write(1, b'out'); os._exit(5)"
    code = f"""
        import sys
        from moecascade.serving import server
        from moecascade.serving.command import Launch
        sys.exit(server.run(Launch({tuple(python(loud))!r}, {{}}, "m", "127.0.0.1", 0)))
    """
    done = subprocess.run(python(code), capture_output=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (5, b"out")
    assert done.stderr == bytes(range(256)) * 1000


def test_the_last_exception_is_found_that_names_a_cause():
    pydantic = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        "  Value error, too few [type=value_error]\n"
        "    For further information visit https://errors.pydantic.dev/2/v/value_error\n"
    )
    begin = "Traceback (most recent call last):\n  File 'x.py', line 1\n    f()\n    ^^^\n"
    cause = f"(EngineCore pid=12) Process EngineCore:\n{begin}RuntimeError: no room\n"
    pointer = f"{begin}RuntimeError: Engine core initialization failed. See root cause above.\n"
    found = server.exception_in
    assert found(begin + pydantic + "[rank0]: a later line\n") == (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig "
        "Value error, too few [type=value_error]"
    )
    assert found(cause + pointer) == "RuntimeError: no room"
    assert found(pointer).startswith("RuntimeError: Engine core")
    assert found("INFO all is well\nError: a line of a log\n") == ""
    assert found(begin) == ""


@pytest.mark.engine
def test_what_vllm_refuses_ends_with_its_reason_on_one_line():
    line = ["serve", "local", "--enable-lora", "--max-num-batched-tokens", "128"]
    done = subprocess.run(
        [sys.executable, "-m", "moecascade", *line, "--port", str(server.free_port())],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moecascade: vLLM ended with this error: ValueError: Consider")
    assert "max_num_batched_tokens" in last
    assert "Traceback" in done.stderr  # vLLM's own words are kept


def test_a_free_port_can_be_used():
    server.check_port("127.0.0.1", server.free_port())


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C reach what a test starts, also where this runs in the background of a shell.

    Shells start what is to run there with SIGINT ignored, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.engine
@pytest.mark.parametrize("what", ["sigterm", "engine killed"])
def test_a_server_that_ends_while_requests_run_leaves_nothing(tmp_path: Path, mark: str, what: str):
    port, log = server.free_port(), (tmp_path / "log").open("w")
    flags = ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "4", "--live-page"]
    before = set(Path(tempfile.gettempdir()).iterdir())
    with subprocess.Popen(
        [sys.executable, "-m", "moecascade", "serve", "local", *flags],
        stdout=log,
        stderr=log,
        start_new_session=True,
    ) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{url}/health"), 300)
        body = {"model": "local", "prompt": "1, 2, 3,", "max_tokens": 400, "ignore_eos": True}
        with ThreadPoolExecutor(3) as pool:
            asked = [
                pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=20)
                for _ in range(3)
            ]
            wait_until(lambda: 'k="0"' in httpx.get(f"{url}/metrics").text, 60)
            if what == "sigterm":
                process.send_signal(signal.SIGTERM)
            else:
                family = psutil.Process(process.pid).children(recursive=True)
                (core,) = [p for p in family if "EngineCore" in " ".join(p.cmdline())]
                core.kill()
            try:
                process.wait(180)  # vLLM may answer first what is under way
            finally:
                process.kill()  # it has ended, or the test has failed
            for one in asked:  # each gets an answer, cut short or not, or an error; none waits on
                assert one.exception(60) is not None or one.result().status_code in {200, 500}
    wait_until(lambda: marked(mark) == [], PATIENCE)
    server.check_port("127.0.0.1", port)
    left = {path.name for path in set(Path(tempfile.gettempdir()).iterdir()) - before}
    mine = "moecascade-tests-"  # of tests that run beside
    assert not [name for name in left if "cascade" in name and not name.startswith(mine)]


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.engine
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("moment", ["start-up", "measuring"])
def test_ctrl_c_ends_the_demo_and_leaves_no_process(tmp_path: Path, mark: str, moment: str):
    log = tmp_path / "server-local-off.log"
    arguments = ["demo", "--out", str(tmp_path), "--policies", "off,cascade"]
    with subprocess.Popen(
        [sys.executable, "-m", "moecascade", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        sign = "EngineCore" if moment == "start-up" else "POST /v1/chat/completions"
        wait_until(lambda: log.exists() and sign in log.read_text(errors="replace"), 300)
        assert len(marked(mark)) >= 3
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        assert process.wait(PATIENCE) == 130
    assert marked(mark) == []
    assert not (tmp_path / "demo.json").exists()


@pytest.mark.engine
def test_what_a_model_answers_can_be_recorded_and_replayed(tmp_path: Path, mark: str):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "traces.jsonl"
    asked = [{"id": f"p{i}", "task": "t", "prompt": f"Count to {5 + i}."} for i in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
    line = ["record", str(prompts), "--out", str(out), "--max-tokens", "16", "--concurrency", "2"]
    answer = subprocess.run(
        [sys.executable, "-m", "moecascade", *line, "--drafter", "eagle"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert marked(mark) == []
    found = list(traces.read([out]))
    assert [(trace.id, trace.task) for trace in found] == [(f"p{i}", "t") for i in range(3)]
    assert all(1 < len(trace.output) <= 16 for trace in found)
    for row in map(json.loads, out.read_text().splitlines()):
        assert sum(step["emitted"] for step in row["steps"]) == len(row["output_token_ids"])
        assert len(row["drafts"]) == len(row["output_token_ids"]) - 1  # at every place
        assert len(row["drafts"][0]) == 8
    for recorded in (False, True):
        conditions = player.ReplayConditions([1.0] * 9, recorded=recorded)
        outcomes = player.play(found, "static:8", conditions)
        assert sum(outcome.tokens for outcome in outcomes) == sum(len(t.output) - 1 for t in found)
    assert sum(outcome.steps for outcome in outcomes) < sum(outcome.tokens for outcome in outcomes)
