"""`moecascade model`: build and list the local models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moecascade import localmodel


def model(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Models to build, by default 'local'.", show_default=False),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Build all of them.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Only show what there is.")] = False,
    force: Annotated[bool, typer.Option(help="Build anew what is there.")] = False,
    path: Annotated[
        bool, typer.Option("--path", help="Print only the folders, for scripts.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the models.", show_default="the user's cache")
    ] = None,
) -> None:
    """Build small real mixture-of-experts models on this machine.

    A small dense model, which comes as a Python package, is turned into mixtures of experts that
    write the same text: its feed-forward layers become experts behind a real router. They are what
    the demo and the tests serve.

    For example:

        moecascade model             build 'local' (8 experts, 1.4 GB)
        moecascade model --all       all of them
        moecascade model --list      what there is, and where
        moecascade model --path      only the folder, for scripts
    """
    chosen = list(localmodel.CATALOGUE) if all_ else (names or ["local"])
    chosen = list(dict.fromkeys(localmodel.find(name).name for name in chosen))
    if not list_:
        _build(chosen, cache, force)
    if path:
        for name in chosen:
            print(localmodel.path_of(name, cache))
        return
    Console().print(_table(cache))


def _build(names: list[str], cache: Path | None, force: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    for name in names:
        if not force and localmodel.state(name, cache) is not None:
            continue
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(f"{name}: starting", total=None)

            def show(what: str, task: int = task, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}")  # type: ignore[arg-type]

            localmodel.ensure(name, cache=cache, force=force, progress=show)
            show("ready")


def _table(cache: Path | None) -> Table:
    folder = cache or localmodel.cache_folder()
    table = Table(title="Local models", caption=f"in {folder}", caption_justify="left")
    for column in ("name", "what it is"):
        table.add_column(column)
    for column in ("experts", "top-k", "params", "disk"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for name, entry in localmodel.CATALOGUE.items():
        place = localmodel.path_of(name, cache)
        record = localmodel.state(name, cache)
        size = sum(f.stat().st_size for f in place.glob("*")) if record else 0
        table.add_row(
            name,
            entry.about,
            str(entry.experts or "-"),
            str(entry.top_k or "-"),
            f"{record['parameters'] / 1e6:,.0f} M" if record else "-",
            f"{size / 1e9:.1f} GB" if record else "-",
            _state(record),
        )
    return table


def _state(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "not built"
    return "verified" if record["verified"] else "built"
