"""Workloads: the prompts that are measured, from our own files or from those that people publish.

Read are JSON Lines and JSON files in these forms, told apart by their keys:

    {"id", "task", "prompt"}                        our own form
    {"question_id", "category", "turns": [...]}     Spec-Bench, MT-Bench: the first turn is asked
    {"task_id", "prompt", "entry_point", ...}       HumanEval as published
    {"question", "answer"}                          GSM8K as published
    [{"id", "conversations": [{"from", "value"}]}]  ShareGPT: the first human message is asked;
                                                    conversations without one are left out
    {"prompt": ...} or {"text": ...}                anything else with a prompt in it

packed by gzip or not (``HumanEval.jsonl.gz``), or the name of a data set on the Hugging Face hub
(``hf:openai/gsm8k:main:test``), where it can be reached and the package `datasets` is installed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

from moecascade.errors import ConfigError, SetupError
from moecascade.evaluation import prompts

TASKS = ("code", "math", "extraction")
"""The tasks of the paper, of which we have prompts of our own."""
REPEATED = " #"  # between the name of a prompt and how often it is repeated
ALL = "all"
"""The name of the mix of all tasks."""

COMPLETE = "Complete this Python function. Answer with the whole function.\n\n```python\n{}\n```"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        id: Its name, unique among all.
        task: What kind of work it asks for; results are broken down by it.
        prompt: The user's message.
    """

    id: str
    task: str
    prompt: str


def own(task: str) -> list[Prompt]:
    """Return this project's prompts of a task, in the order of their file.

    Raises:
        ConfigError: There is no such task.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; allowed: {', '.join(TASKS)}")
    text = (resources.files(prompts) / f"{task}.jsonl").read_text(encoding="utf-8")
    return [Prompt(**json.loads(line)) for line in text.splitlines()]


def read(sources: Sequence[str]) -> list[Prompt]:
    """Return the prompts of files and data sets; of our own files where there are none.

    Raises:
        ConfigError: A source cannot be read or holds no prompts; two prompts have the same name.
        SetupError: A data set cannot be reached.
    """
    if not sources:
        return [prompt for task in TASKS for prompt in own(task)]
    found: dict[str, Prompt] = {}
    for source in sources:
        rows = _hub(source) if source.startswith("hf:") else _file(Path(source))
        prompts = [_prompt(row, i, source) for i, row in enumerate(rows) if not _is_mute(row)]
        if not prompts:
            raise ConfigError(f"{source}: holds no prompts; see 'moecascade bench --help'")
        for prompt in prompts:
            if prompt.id in found:
                raise ConfigError(
                    f"{source}: prompt {prompt.id!r} has appeared before; names must differ"
                )
            found[prompt.id] = prompt
    return list(found.values())


def mix(prompts: Iterable[Prompt], per_task: int | None = None) -> list[Prompt]:
    """Return `per_task` prompts of every task, in alternation; all there are if None.

    A task with fewer begins again, its prompts numbered (``code-01#2``), so that shares are equal:
    sampled with another seed they are further observations, at temperature 0 only of the time.

    Raises:
        ConfigError: Fewer than one prompt a task is asked for.
    """
    if per_task is not None and per_task < 1:
        raise ConfigError(f"{per_task} prompts a task (--prompts-per-task): give a number from 1")
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    if per_task is not None:
        by_task = {task: _repeated(of_task, per_task) for task, of_task in by_task.items()}
    return [p for turn in zip_longest(*by_task.values()) for p in turn if p is not None]


def apart(prompts: Sequence[Prompt], per_task: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return the last prompts of each task, mixed, and those that are left, as they came.

    To be done before `mix` repeats any, so that nothing is asked that is in both.

    Raises:
        ConfigError: A task would have none left.
    """
    taken: list[Prompt] = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        of_task = [prompt for prompt in prompts if prompt.task == task]
        if len(of_task) <= per_task:
            raise ConfigError(
                f"{per_task} prompts to warm up with leave none of the {len(of_task)} of task "
                f"{task!r}; give at most {len(of_task) - 1}"
            )
        taken += of_task[len(of_task) - per_task :]
    names = {prompt.id for prompt in taken}
    return mix(taken), [prompt for prompt in prompts if prompt.id not in names]


def _repeated(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    repeated = []
    for i in range(number):
        prompt, again = prompts[i % len(prompts)], i // len(prompts)
        repeated.append(
            replace(prompt, id=f"{prompt.id}{REPEATED}{again + 1}") if again else prompt
        )
    return repeated


def workloads(tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the workloads that can be made of tasks, by name.

    Each task alone; of up to three tasks also every equal mix (the paper's seven workloads); else
    the mix of all.
    """
    single: dict[str, tuple[str, ...]] = {task: (task,) for task in tasks}
    if len(tasks) < 2:
        return single
    pairs = {"+".join(pair): pair for pair in combinations(tasks, 2)} if len(tasks) == 3 else {}
    return {**single, **pairs, ALL: tuple(tasks)}


def _file(path: Path) -> list[Any]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"cannot read prompts {str(path)!r}: {getattr(error, 'strerror', None) or error}; give "
            "a JSON Lines file, or hf:NAME[:CONFIG[:SPLIT]] for a data set on the hub"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8; convert it") from None
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON ({error})") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # strings may hold other line ends
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def _hub(source: str) -> list[Any]:
    name, *rest = source.removeprefix("hf:").split(":")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise SetupError(f"{source}: needs the package datasets: 'pip install datasets'") from None
    try:
        split = rest[1] if len(rest) > 1 else "test"
        return list(load_dataset(name, *rest[:1], split=split))
    except Exception as error:  # noqa: BLE001 -- the hub's errors are of many kinds
        raise SetupError(
            f"{source}: cannot be loaded ({error}); the form is hf:NAME[:CONFIG[:SPLIT]]"
        ) from None


def _is_mute(row: Any) -> bool:
    """Return whether a row is a conversation in which no human says anything, as some are."""
    turns = row.get("conversations") if isinstance(row, Mapping) else None
    return isinstance(turns, list) and not _said(turns)


def _unpacked(path: Path) -> str:
    """Return the name of a file without its ending, nor that of being packed."""
    return Path(path.name.removesuffix(".gz")).stem


def _said(turns: Iterable[Any]) -> list[str]:
    """Return what humans say in a conversation."""
    return [
        turn["value"]
        for turn in turns
        if isinstance(turn, Mapping)
        and turn.get("from") in ("human", "user")
        and str(turn.get("value", "")).strip()
    ]


def _prompt(row: Any, number: int, source: str) -> Prompt:
    """Return the prompt of a row, whichever form it has."""
    where = f"{source}, prompt {number + 1}"
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: expected an object, got {row!r:.80}")
    stem = _unpacked(Path(source))
    try:
        if "turns" in row:
            name, task, text = row["question_id"], row["category"], row["turns"][0]
        elif "entry_point" in row:
            name, task, text = row["task_id"], "code", COMPLETE.format(row["prompt"].rstrip())
        elif "conversations" in row:
            text = _said(row["conversations"])[0]
            name, task = row.get("id", number), "chat"
        elif "question" in row:
            name, task, text = f"{stem}-{number}", "math", row["question"]
        else:
            text = row["prompt"] if "prompt" in row else row["text"]
            name, task = row.get("id", f"{stem}-{number}"), row.get("task", stem)
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{where}: of no known form (missing: {error}); a line is "
            '{"id": ..., "task": ..., "prompt": ...}, or as its publisher made it'
        ) from None
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: its prompt is empty or no text")
    return Prompt(str(name), str(task), text)
