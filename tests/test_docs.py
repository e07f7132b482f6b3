"""What README and docs say can be typed: commands parse, links lead somewhere, JSON is JSON."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from moecascade.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")

COMMANDS = typer.main.get_command(app)


def of_page(page: Path) -> str:
    return page.name


def pages(pattern: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for found in re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE):
            yield page.name, found


def blocks() -> Iterator[tuple[str, str]]:
    """Yield the lines that are shown as something to type, continued ones joined."""
    for page, line in pages(r"(?:^    (?:.*\\\n)*.*$)"):
        yield page, line.replace("\\\n", " ").strip()


def typed() -> set[tuple[str, str]]:
    """Return all that is shown as a command, in blocks and in running text."""
    inline = pages(r"`((?:make|moecascade|python) [^`]+)`")
    shown = (
        (page, line) for page, line in blocks() if re.match(r"(make|moecascade|python) ", line)
    )
    return {
        (page, line.split("   ")[0].split(" # ")[0].strip()) for page, line in [*inline, *shown]
    }


TYPED = sorted(typed())


def test_pages_are_read_and_show_something_to_type():
    assert {"README.md", "CONTRIBUTING.md", "architecture.md"} <= {page.name for page in PAGES}
    assert len(TYPED) > 20
    assert any(line.startswith("moecascade serve") for _, line in TYPED)


def test_the_readme_is_for_three_minutes():
    assert len(README.splitlines()) <= 140
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_links_and_pictures_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize(("page", "line"), TYPED)
def test_what_is_to_be_typed_exists(page: str, line: str):
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(
            r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
        )
        for word in words[1:]:
            assert "=" in word or word in targets, line
    elif words[0] == "python":
        if words[1] != "-m":
            assert (ROOT / words[1]).exists(), line
    else:
        known = COMMANDS.commands  # type: ignore[attr-defined]
        assert words[1] in known or words[1].startswith("-"), line
        if words[1] in known:
            ours = {name for parameter in known[words[1]].params for name in parameter.opts}
            takes_any = known[words[1]].context_settings.get("ignore_unknown_options", False)
            for word in words[2:]:
                flag = word.partition("=")[0]
                assert not flag.startswith("--") or flag in ours or takes_any, line


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_json_for_vllm_is_json(page: Path):
    text = page.read_text(encoding="utf-8")
    for given in re.findall(
        r"--(?:additional-config|speculative-config)[\s\\]+'(\{.*?\})'", text, re.DOTALL
    ):
        assert isinstance(json.loads(given.replace("\\\n", " ")), dict), given
