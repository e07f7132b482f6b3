"""The prompts of the demo: three tasks, from writing that copies its prompt to writing that cannot.

One JSON Lines file a task, ``{"id": ..., "task": ..., "prompt": ...}`` a line, all written for this
project.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from moecascade.errors import ConfigError

TASKS = ("code", "math", "extraction")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        id: Its name, unique among all.
        task: One of `TASKS`.
        prompt: The user's message.
    """

    id: str
    task: str
    prompt: str


def load(task: str) -> list[Prompt]:
    """Return the prompts of a task, in the order of its file.

    Raises:
        ConfigError: There is no such task.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; allowed: {', '.join(TASKS)}")
    text = (files(__name__) / f"{task}.jsonl").read_text(encoding="utf-8")
    return [Prompt(**json.loads(line)) for line in text.splitlines()]


def mix(per_task: int) -> list[Prompt]:
    """Return the first `per_task` prompts of every task, in alternation.

    Raises:
        ConfigError: There are not so many, or fewer than one are asked for.
    """
    by_task = [load(task) for task in TASKS]
    most = min(len(prompts) for prompts in by_task)
    if not 1 <= per_task <= most:
        raise ConfigError(f"{per_task} prompts a task: give a number from 1 to {most}")
    return [prompts[i] for i in range(per_task) for prompts in by_task]
