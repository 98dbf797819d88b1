"""The command line: `attnreuse sample`, `search`, `analyze`, `compare`, `plan`, `bench`, `doctor`; a file for each."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from attnreuse.cli import analyze, bench, compare, doctor, plan, sample, search
from attnreuse.measure.environment import package_version
from attnreuse.measure.timing import keep_freed_memory

app = typer.Typer(
    help="Reuse attention maps between diffusion steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (sample, search, analyze, compare, plan, bench, doctor):
    app.command(command.__name__.rpartition(".")[2], epilog=f"Examples:\n\n{command.EXAMPLES}")(command.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"attnreuse {package_version('attnreuse')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point of the `attnreuse` command."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    keep_freed_memory()
    app()
