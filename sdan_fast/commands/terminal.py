"""What the commands share of the terminal: consoles, tables, progress, errors."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# Exit codes, documented in docs/cli.md.
FAILED = 1  # a check failed, or a picture of several could not be made
MISUSE = 2  # wrong options or input: nothing was done


def console(*, stderr: bool = False) -> Console:
    """A console that wraps at the terminal's width, and nowhere where the output goes to a file or a pipe.

    rich itself honours NO_COLOR and leaves colours out where nobody looks.
    """
    out = Console(stderr=stderr, highlight=False, markup=False)
    if not out.is_terminal:
        out.width = 160
    return out


def table(
    *columns: str, title: str | None = None, right: tuple[str, ...] = (), compact: bool = False
) -> Table:
    """An empty table; the columns named in `right` hold numbers. A compact one has no vertical lines."""
    result = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    if compact:
        result.box, result.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    for name in columns:
        result.add_column(name, justify="right" if name in right else "left")
    return result


def progress(**kwargs: Any) -> Progress:
    """A progress bar on stderr, and nothing at all where stderr is no terminal."""
    out = console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=out,
        disable=not sys.stderr.isatty(),  # FORCE_COLOR makes rich see a terminal in a pipe
        transient=True,
        **kwargs,
    )


def warn(message: str) -> None:
    """One line on stderr."""
    print_line("warning", "yellow", message)


def error(message: str) -> None:
    """One line on stderr."""
    print_line("error", "red", message)


def print_line(word: str, style: str, message: str) -> None:
    """`word: message` on stderr, never wrapped: a script reads it by lines."""
    out = console(stderr=True)
    out.print(Text(f"{word}: ", style=style) + Text(message, style="default"), soft_wrap=True)


def fail(message: str, code: int = MISUSE) -> NoReturn:
    """Print an error and end the command with this exit code."""
    error(message)
    raise typer.Exit(code)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "180x320".

    Raises:
        typer.BadParameter: for anything else.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"must be HEIGHTxWIDTH in pixels, like 180x320, and it is {text!r}")
    return int(match[1]), int(match[2])


def require_backend(name: str) -> None:
    """End the command unless `name` is "auto" or a backend that can run something here.

    Raises:
        typer.BadParameter: if there is no such backend.
    """
    from .. import backends

    if name not in backends.NAMES:
        raise typer.BadParameter(
            f"must be one of {', '.join(backends.NAMES)}, and it is {name!r}", param_hint="--backend"
        )
    for line in backends.status():
        if line.name == name and not line.available:
            fail(f"the backend {name!r} cannot run here: {line.reason}")
