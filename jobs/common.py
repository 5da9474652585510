"""What every job shares: options in both spellings, and errors that end in one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shortv.errors import ShortVError

# Read when Ray is imported: what still touches it after a job has disconnected would start it anew in the background.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def bundled(name: str) -> str:
    """A part of the bundled model's folder, as a path from here where that is possible."""
    path = Path(__file__).resolve().parent.parent / "shortv" / "tiny" / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def option(name: str, *rest: Any, **attributes: Any) -> Callable[[Any], Any]:
    """A click option in Ray's spelling (`--output-path`) and in lmms-eval's (`--output_path`)."""
    names = [name]
    if "-" in name.removeprefix("--"):
        names.append("--" + name.removeprefix("--").replace("-", "_"))
    return click.option(*names, *rest, **attributes)


def run(command: click.Command) -> None:
    """Run a job; 0 complete, 1 failed while working, 2 refused before work starts, 3 finished with failures."""
    try:
        status = command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ShortVError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_status)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped; the same command continues.", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
