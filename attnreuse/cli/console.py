"""What a command says: results on stdout, errors and progress on stderr, nothing of it read as markup."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from attnreuse.errors import AttnReuseError
from attnreuse.progress import Progress

out = Console(markup=False, highlight=False, emoji=False)
err = Console(stderr=True, markup=False, highlight=False, emoji=False)
# Options by their arguments: those that are words of their own where a message begins with them, others anywhere.
WORDS = {"floor", "guidance", "layers", "reuse", "schedules", "student", "time"}
OPTIONS = {"map_format": "--format", "max_age": "--max-age", "memory_budget": "--memory-budget"}
EVERY = 30.0  # seconds between lines of progress without a terminal


def faint(text: str) -> None:
    """A line that is read last: where files are, on what was measured."""
    out.print(Text(text, style="dim"))


@contextlib.contextmanager
def clear_errors(kept: Callable[[], str] = lambda: "nothing was written") -> Iterator[None]:
    """Bad input ends in one clear line and exit code 2; an interrupt in one that says what is `kept`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        err.print(f"stopped: {kept()}", soft_wrap=True)
        raise typer.Exit(130) from stop
    except (AttnReuseError, ValueError, OSError) as error:
        said = str(error).strip() or type(error).__name__
        err.print(Text.assemble(("error: ", "red"), _as_typed(said.splitlines()[0])), soft_wrap=True)
        raise typer.Exit(2) from error


def _as_typed(said: str) -> str:
    """A message that names arguments, with the options that give them instead."""
    said = re.sub(r"\b\w+_\w+\b", lambda word: OPTIONS.get(word[0], word[0]), said)
    return f"--{said}" if said.partition(" must ")[0] in WORDS else said


@contextlib.contextmanager
def progress(unit: str, at_most: bool = False) -> Iterator[Progress]:
    """Tell how many of `unit` are done, and what runs; on a terminal in place, else in a line now and then.

    Args:
        at_most: the count is a limit that need not be reached.
    """

    def text(done: int, of: int, now: str, other: str) -> str:
        return f"{done} of {'at most ' if at_most and not other else ''}{of} {other or unit}; {now}"

    if err.is_terminal:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        bar: list[Any] = [] if at_most else [BarColumn(20, table_column=Column(min_width=20))]
        elapsed = TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7))
        column = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # gives way, not the bar
        doing = TextColumn("{task.description}", markup=False, table_column=column)
        with Bar(SpinnerColumn(), *bar, elapsed, doing, console=err, transient=True, expand=True) as shown:
            task = shown.add_task("starting", total=None)

            def show(done: int, of: int, now: str, *, unit: str = "") -> None:
                shown.update(task, completed=done, total=of, description=text(done, of, now, unit))

            yield show
        return
    last = time.monotonic()  # what is over in a moment says nothing

    def tell(done: int, of: int, now: str, *, unit: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            err.print(text(done, of, now, unit), soft_wrap=True)

    yield tell
