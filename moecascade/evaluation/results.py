"""The one schema in which measurements are kept, and how they get to disk.

    {"schema": "moecascade.results/2", "kind": "demo", "created": "2026-01-31T12:00:00+00:00",
     "code": {"version": ..., "commit": ..., "modified": ...}, "arguments": {...}, "machine": {...},
     "versions": {...}, "models": [{...}], "servers": [{"command": [...], "environment": {...}}],
     "rows": [...], "summary": [...]}

``rows`` are what was measured, one object for each request (`evaluation.request_record.Row`);
``summary`` are the speed-ups that follow from them (`evaluation.report.speedups.Cell`), for who
reads the file without us. Files of results/1, whose rows were flat, are read as well.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moecascade.core.settings import from_mapping
from moecascade.errors import ConfigError
from moecascade.serving import machine
from moecascade.telemetry.files import write_whole

SCHEMA = "moecascade.results/2"
STEP_TIMES = "step-times"
"""The kind of results whose drafts mean nothing: they only tell what steps take."""
READ = ("moecascade.results/1", SCHEMA)


@dataclass(frozen=True, slots=True)
class Results:
    """Measurements and all that is needed to judge or repeat them.

    Attributes:
        kind: What measured ("demo", "bench", `STEP_TIMES`).
        created: When, in ISO 8601 with time zone.
        code: Version of moecascade; commit and whether files differ from it, where known.
        arguments: The command's options, defaults included.
        machine: Processor, cores, memory, GPUs.
        versions: Of Python and of the packages that matter.
        models: What was served: name, sizes.
        servers: Each one's command line and the environment variables set for it.
        rows: The measurements.
        summary: The speed-ups that follow from them, with their intervals.
    """

    kind: str
    created: str
    code: dict[str, Any]
    arguments: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, Any]
    models: list[dict[str, Any]]
    servers: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    schema: str = field(default=SCHEMA)


def collect(
    kind: str,
    *,
    arguments: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    servers: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
) -> Results:
    """Return `Results` made here and now: time, code, machine and versions are filled in."""
    return Results(
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code=code(),
        arguments=dict(arguments),
        machine=machine.describe(),
        versions=dict(machine.versions()),
        models=[dict(model) for model in models],
        servers=[dict(server) for server in servers],
        rows=[dict(row) for row in rows],
        summary=[dict(row) for row in summary],
    )


def plain(row: Any) -> dict[str, Any]:
    """Return a dataclass as JSON's types."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(row)))
    return values


def code() -> dict[str, Any]:
    """Return which code this is: the version, and the commit where it runs from a checkout."""
    found: dict[str, Any] = {
        "version": machine.version("moecascade"),
        "commit": None,
        "modified": None,
    }
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        found["commit"] = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "--untracked-files=no")
        found["modified"] = None if status is None else bool(status)
    return found


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git answers, None where it fails or is missing."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments],  # noqa: S607 -- the user's own
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def write(path: Path, results: Results) -> None:
    """Write `results` as JSON. The file appears whole or not at all; its folder is made."""
    values = {"schema": results.schema, **asdict(results)}  # first, for who looks at the head
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text)


def read(path: Path) -> Results:
    """Return the results in a file.

    Raises:
        ConfigError: There is no such file, or it is not of this schema.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a file that this version wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); give a results file") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema not in READ:
        known = " and ".join(map(repr, READ))
        raise ConfigError(f"{path}: schema is {schema!r}, this version reads {known}")
    return from_mapping(Results, values, str(path))
