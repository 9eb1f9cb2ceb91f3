"""The command line `sdan-fast`: this module only puts the commands of `sdan_fast.commands` together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# What `pip install 'sdan-fast[cli]'` adds. Without one of these the package works and only the commands do not.
_EXTRA = {"typer", "rich", "PIL", "safetensors", "skimage", "click"}


def _without(package: str) -> Callable[..., Any]:
    """An entry point that says which package is missing."""

    def app(*args: Any, **kwargs: Any) -> None:
        print(
            f"sdan-fast: the command line needs {package}, which is not installed: pip install 'sdan-fast[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2)

    return app


def _build_app() -> Callable[..., Any]:
    try:
        import rich  # noqa: F401 - asked for first, because typer makes do without it
        import typer

        from .commands import bench, demo, info, inspect, train, tune, upscale, verify
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        return _without(package)

    app = typer.Typer(
        name="sdan-fast",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        help="SDAN image super-resolution and its kernels for CPUs and GPUs: look, check, run.",
        epilog="Exit codes: 0 all well; 1 a check or a picture failed; 2 wrong use, nothing was done.",
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", help="Print the version and exit.", callback=info.print_version, is_eager=True
        ),
    ) -> None:
        pass

    app.command("info", short_help="What is installed, what can run here, what is missing.")(info.info)
    app.command("verify", short_help="Check every op and the model against float64.")(verify.verify)
    app.add_typer(bench.app, name="bench", short_help="Time the ops or the whole network against every peer.")
    app.command("demo", short_help="SDAN on a photograph: checked, timed, explained.")(demo.demo)
    app.command("train", short_help="Train SDAN on pictures.")(train.train)
    app.command("tune", short_help="Time the Triton kernels' settings on this GPU.")(tune.tune_command)
    app.command("upscale", short_help="Enlarge pictures with a checkpoint.")(upscale.upscale)
    app.add_typer(inspect.app, name="inspect", short_help="The GPU kernels' machine code and modelled times.")
    return app


app = _build_app()
