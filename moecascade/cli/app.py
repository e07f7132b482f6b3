"""The command `moecascade`: its first screen, its commands, and its exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moecascade.cli.bench import bench
from moecascade.cli.demo import demo
from moecascade.cli.doctor import doctor
from moecascade.cli.model import model
from moecascade.cli.plan import plan
from moecascade.cli.record import record
from moecascade.cli.replay import replay
from moecascade.cli.report import report
from moecascade.cli.serve import serve
from moecascade.cli.simulate import simulate
from moecascade.errors import CascadeError
from moecascade.serving import machine

BAD_INPUT = 2
"""Exit code for what the user can mend: wrong options, a machine that is not ready."""
INTERRUPTED = 130

app = typer.Typer(
    name="moecascade",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moecascade {machine.version('moecascade') or 'from a checkout'}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Speculative decoding that switches itself off where it does not pay.

    A plugin for vLLM: it measures what drafts earn and what they cost, for each request while it
    runs, and chooses the draft length K, 0 included. Made for mixture-of-experts models, where
    verifying drafts is expensive. Start here:

        moecascade doctor        is everything there?
        moecascade demo          see what it does: real server, local model, one table
        moecascade plan MODEL    what would it gain, on a machine that is not here?
        moecascade serve MODEL   serve your own model
    """


serve_settings = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(no_args_is_help=True, context_settings=serve_settings)(serve)
app.command()(demo)
app.command(context_settings=serve_settings)(bench)
app.command()(doctor)
app.command()(model)
app.command(no_args_is_help=True)(plan)
app.command(context_settings=serve_settings)(record)
app.command(no_args_is_help=True)(replay)
app.command(no_args_is_help=True)(report)
app.command(no_args_is_help=True)(simulate)


def run() -> None:
    """Run the command line. The one place where errors become messages and exit codes."""
    try:
        app()
    except CascadeError as error:
        print(f"moecascade: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run()
