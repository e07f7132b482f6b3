"""Workloads: the prompts that are measured, from our own files or from those that people publish.

Read are JSON Lines and JSON files in these forms, told apart by their keys:

    {"id", "task", "prompt"}                        our own form
    {"messages": [{"role", "content"}]}             chats: all turns up to the user's last are sent,
                                                    the system's too
    {"custom_id", "body": {"messages": ...}}        lines for OpenAI's batch API
    {"question_id", "category", "turns": [...]}     Spec-Bench, MT-Bench: the first turn is asked
    {"task_id", "prompt", "entry_point", ...}       HumanEval as published
    {"question", "answer"}                          GSM8K as published
    [{"id", "conversations": [{"from", "value"}]}]  ShareGPT: the first human message is asked
    {"prompt": ...} or {"text": ...}                anything else with a prompt in it

packed by gzip or not (``HumanEval.jsonl.gz``), or the name of a data set on the Hugging Face hub
(``hf:openai/gsm8k:main:test``), where it can be reached and the package `datasets` is installed.
Conversations in which no human says anything are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import combinations, count, zip_longest
from pathlib import Path
from typing import Any

from moecascade.errors import ConfigError, SetupError
from moecascade.evaluation import prompts
from moecascade.telemetry.files import records

logger = logging.getLogger("moecascade")

TASKS = ("code", "math", "extraction")
"""The tasks of the paper, of which we have prompts of our own."""
REPEATED = " #"  # between the name of a prompt and how often it is repeated
ALL = "all"
"""The name of the mix of all tasks."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Who speaks in a conversation, in the words of those who publish them, and in vLLM's."""

COMPLETE = "Complete this Python function. Answer with the whole function.\n\n```python\n{}\n```"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        id: Its name, unique among all.
        task: What kind of work it asks for; results are broken down by it.
        prompt: The user's message, the last of a conversation.
        before: What was said before it, the system's text too: pairs of role and text.
    """

    id: str
    task: str
    prompt: str
    before: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """What is sent: the conversation as the OpenAI API has it."""
        said = (*self.before, ("user", self.prompt))
        return [{"role": role, "content": text} for role, text in said]


def own(task: str) -> list[Prompt]:
    """Return this project's prompts of a task, in the order of their file.

    Raises:
        ConfigError: There is no such task.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; allowed: {', '.join(TASKS)}")
    with resources.as_file(resources.files(prompts) / f"{task}.jsonl") as path:
        return [Prompt(**row) for _, row in records(path)]


def read(sources: Sequence[str]) -> list[Prompt]:
    """Return the prompts of files and data sets; of our own files where there are none.

    A name that has appeared before gets a number (``a``, ``a-2``), with a warning.

    Raises:
        ConfigError: A source cannot be read or holds no prompts.
        SetupError: A data set cannot be reached.
    """
    if not sources:
        return [prompt for task in TASKS for prompt in own(task)]
    found: dict[str, Prompt] = {}
    for source in sources:
        prompts = list(_prompts(source))
        if not prompts:
            raise ConfigError(f"{source}: holds no prompts; see 'moecascade bench --help'")
        renamed: dict[str, str] = {}
        for prompt in prompts:
            name = _unused(prompt.id, found)
            if name != prompt.id:
                renamed[name] = prompt.id
            found[name] = replace(prompt, id=name)
        if renamed:
            new, old = next(iter(renamed.items()))
            logger.warning(
                "%s: the names of %d prompts have appeared before; they are numbered, as the "
                "second %r is now %r",
                *(source, len(renamed), old, new),
            )
    return list(found.values())


def _unused(name: str, used: Mapping[str, Any]) -> str:
    numbered = (f"{name}-{number}" for number in count(2))
    return name if name not in used else next(new for new in numbered if new not in used)


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


def _prompts(source: str) -> Iterator[Prompt]:
    """Yield the prompts of a source."""
    rows: Iterable[tuple[str, Any]]
    if source.startswith("hf:"):
        rows = ((f"{source}, row {i}", row) for i, row in enumerate(_hub(source), 1))
    elif Path(source).exists():
        rows = records(source)
    else:
        raise ConfigError(
            f"there is no file {source!r}; give a JSON Lines file of prompts, or "
            "hf:NAME[:CONFIG[:SPLIT]] for a data set on the hub"
        )
    stem = Path(Path(source).name.removesuffix(".gz")).stem
    for number, (place, row) in enumerate(rows):
        if (prompt := _prompt(row, place, stem, number)) is not None:
            yield prompt


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


Turns = list[tuple[str, str]]
"""A conversation: the role and the text of each turn."""


def _prompt(row: Any, place: str, stem: str, number: int) -> Prompt | None:
    """Return the prompt of a row, whichever form it has; None where no human says anything."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{place}: expected an object, got {row!r:.80}")
    if isinstance(row.get("body"), Mapping):
        row = {"id": row.get("custom_id"), **row["body"]}
    form = next((FORMS[key] for key in FORMS if key in row), None)
    if form is None:
        raise ConfigError(
            f"{place}: of no known form, its keys are {', '.join(map(str, row)) or 'none'}; a "
            f"prompt stands under one of {', '.join(FORMS)}, or in an OpenAI batch line's body; "
            'for example {"id": ..., "task": ..., "prompt": ...}'
        )
    try:
        name, task, turns = form(row)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    if not turns:
        return None
    *before, (_, text) = turns
    name, task = (given if given is not None else "" for given in (name, task))
    return Prompt(str(name) or f"{stem}-{number}", str(task) or stem, text, tuple(before))


def _asked(text: Any) -> Turns:
    """Return a prompt as a conversation, which it may be already."""
    if isinstance(text, list):
        return _up_to_last(text)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError("its prompt is empty or no text; mend or remove it")
    return [("user", text)]


def _up_to_last(turns: Any) -> Turns:
    """Return a conversation up to the last turn of a human, all of whose turns can be sent."""
    said = _said(turns)
    while said and said[-1][0] != "user":
        said.pop()
    for role, _ in said:
        if role not in ROLES.values():
            raise ConfigError(f"a turn of {role!r} cannot be sent; allowed: {', '.join(ROLES)}")
    return said


def _first(turns: Any) -> Turns:
    """Return the first turn of a human, after those of the system before it."""
    said = _said(turns)
    asked = [i for i, (role, _) in enumerate(said) if role == "user"]
    return [turn for turn in said[: asked[0] + 1] if turn[0] != "assistant"] if asked else []


def _said(turns: Any) -> Turns:
    """Return the turns that say anything, whichever way they are written."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ConfigError(
            'a conversation is a list such as [{"role": "user", "content": "..."}], '
            f"got {turns!r:.80}"
        )
    roles = [str(turn.get("role", turn.get("from"))) for turn in turns]
    texts = [_text(turn.get("content", turn.get("value"))) for turn in turns]
    pairs = zip(roles, texts, strict=True)
    return [(ROLES.get(role, role), text) for role, text in pairs if text.strip()]


def _text(content: Any) -> str:
    """Return the text of a turn, which may come in parts; none is none."""
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    said = [text for text in texts if isinstance(text, str)]
    if len(said) < len(texts):
        raise ConfigError(f"only text can be sent, but a turn holds {content!r:.80}")
    return "\n".join(said)


FORMS: dict[str, Callable[[Mapping[str, Any]], tuple[Any, Any, Turns]]] = {
    "turns": lambda row: (
        row.get("question_id"),
        row.get("category"),
        _asked((row["turns"] or [""])[0] if isinstance(row["turns"], list) else None),
    ),
    "entry_point": lambda row: (
        row.get("task_id"),
        "code",
        [("user", COMPLETE.format(_asked(row.get("prompt"))[-1][1].rstrip()))],
    ),
    "conversations": lambda row: (row.get("id"), "chat", _first(row["conversations"])),
    "messages": lambda row: (row.get("id"), row.get("task"), _up_to_last(row["messages"])),
    "question": lambda row: (row.get("id"), "math", _asked(row["question"])),
    "prompt": lambda row: (row.get("id"), row.get("task"), _asked(row["prompt"])),
    "text": lambda row: (row.get("id"), row.get("task"), _asked(row["text"])),
}
"""Name, task and turns of a row, by the key that tells its form; the first that it has counts."""
