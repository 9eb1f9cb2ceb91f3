"""Write the commands and options into docs/cli.md, from the command line itself.

    python scripts/cli_reference.py            # write
    python scripts/cli_reference.py --check    # exit status 1 if the file is out of date

The prose of docs/cli.md is written by hand. A command that has no section yet gets one at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import typer

import generated
from sdan_fast.cli import app

PAGE = generated.ROOT / "docs" / "cli.md"
COMMAND = "python scripts/cli_reference.py"


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it, in the order of the help."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        if not child.hidden:
            yield from commands(child, (*path, name))


def overview(root: Any) -> str:
    """The table of all commands."""
    lines = ["| command | what it does |", "|---|---|"]
    for path, command in commands(root):
        lines.append(f"| `sdan-fast {' '.join(path)}` | {_sentence(command.short_help or command.help)} |")
    return "\n".join(lines)


def _sentence(text: str | None) -> str:
    return next(iter((text or "").strip().splitlines()), "").rstrip(".")


def reference(path: tuple[str, ...], command: Any) -> str:
    """Synopsis and options of one command."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [
        p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"
    ]
    words = [_argument(p) for p in arguments]
    words += [f"{max(p.opts, key=len)} {_metavar(p)}" for p in options if p.required]
    synopsis = " ".join(["sdan-fast", *path, *words, *(["[OPTIONS]"] if options else [])])
    lines = ["```", synopsis, "```", ""]
    lines += ["| | | default |", "|---|---|---|"] if arguments or options else []
    lines += [f"| `{_argument(p)}` | {_cell(p.help)} | |" for p in arguments]
    lines += [f"| {_names(p)} | {_cell(p.help)} | {_default(p)} |" for p in options]
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _names(parameter: Any) -> str:
    names = [*sorted(parameter.opts, key=len, reverse=True), *parameter.secondary_opts]
    value = "" if parameter.is_flag else f" {_metavar(parameter)}"
    return ", ".join(f"`{name}{value}`" for name in names)


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or value == () or callable(value):
        return ""
    return "on" if value is True else f"`{value}`"


def section_name(path: tuple[str, ...]) -> str:
    return " ".join(path)


def page(text: str, root: Any) -> str:
    """The page with every generated block as it should be.

    Raises:
        ValueError: if the page describes a command that is not there.
    """
    text = generated.replace(text, "commands", overview(root), COMMAND)
    known = {section_name(path): reference(path, command) for path, command in commands(root)}
    present = generated.names(text)
    for name in present:
        if name != "commands" and name not in known:
            raise ValueError(f"docs/cli.md describes `sdan-fast {name}`, and there is no such command")
    for name, content in known.items():
        if name not in present:
            text = text.rstrip("\n") + f"\n\n## {name}\n\n{generated.block(name, content, COMMAND)}\n"
        text = generated.replace(text, name, content, COMMAND)
    return text


def main() -> int:
    """0 if the page is, or now is, up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 if it is out of date"
    )
    options = parser.parse_args()
    root = typer.main.get_command(app)  # type: ignore[arg-type]
    try:
        new = page(PAGE.read_text(encoding="utf-8"), root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return generated.update(PAGE, new, check=options.check, command=COMMAND)


if __name__ == "__main__":
    sys.exit(main())
