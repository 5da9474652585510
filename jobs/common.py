"""What every job shares: options in both spellings, and errors that end in one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from reports.store import Folder
from shortv.errors import ShortVError
from shortv.spec import Spec, flag_of, plain_types
from shortv.terminal import printable

# Read when Ray is imported: what still touches it after a job has disconnected would start it anew in the background.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def bundled(name: str) -> str:
    """A part of the bundled model's folder, as a path from here where that is possible."""
    path = Path(__file__).resolve().parent.parent / "shortv" / "tiny" / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def place_of(output: str, name: str) -> tuple[Folder, str]:
    """Return the folder and the name of an output file; in a folder it gets this name."""
    if output.endswith("/") or os.path.isdir(output):
        return Folder(output), name
    parent, slash, file = output.rpartition("/")
    return Folder(parent + slash or "."), file


def option(name: str, *rest: Any, **attributes: Any) -> Callable[[Any], Any]:
    """A click option in Ray's spelling (`--output-path`) and in lmms-eval's (`--output_path`)."""
    names = [name]
    if "-" in name.removeprefix("--"):
        names.append("--" + name.removeprefix("--").replace("-", "_"))
    return click.option(*names, *rest, **attributes)


def options_of(spec: type[Spec], *, leave_out: Collection[str] = ()) -> Callable[[Any], Any]:
    """Add one option per field of a spec to a command. An option that was not given is None, or an empty tuple.

    Values stay text, so that one place, the spec, checks them whether they come from a flag or from a file.
    """

    def decorate(command: Any) -> Any:
        for name, field in reversed(spec.model_fields.items()):
            if name not in leave_out:
                command = _option_of(name, field)(command)
        return command

    return decorate


def _option_of(name: str, field: FieldInfo) -> Callable[[Any], Any]:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if "flag" in extra and extra["flag"] is None:
        return lambda command: command
    annotation = field.annotation
    kinds = plain_types(annotation)
    attributes: dict[str, Any] = {"default": None, "help": (field.description or "") + _shown_default(field)}
    literals = (kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal)
    choices = next((get_args(kind) for kind in literals), None)
    if bool in kinds:
        attributes["is_flag"] = True
    if choices:
        attributes["type"] = click.Choice([str(choice) for choice in choices])
    if get_origin(annotation) is tuple:
        attributes["multiple"] = True
    if "metavar" in extra or not (bool in kinds or choices):
        attributes["metavar"] = str(extra.get("metavar") or _metavar(kinds))
    short = [str(extra[kind]) for kind in ("also", "short") if kind in extra]
    return option(flag_of(name, field), *short, name, **attributes)


def _metavar(kinds: Collection[Any]) -> str:
    return "INTEGER" if int in kinds and float not in kinds else "NUMBER" if float in kinds else "TEXT"


def _shown_default(field: FieldInfo) -> str:
    default = field.default
    if field.is_required() or field.default_factory or default is None or default is False or default == ():
        return ""
    if isinstance(default, float):
        default = f"{default:g}"
    return f" [default: {','.join(map(str, default)) if isinstance(default, tuple) else default}]"


def _let_logs_through(_: click.Context, __: click.Parameter, value: bool) -> None:
    if value:
        # Read where Ray is started, also in processes that a job starts.
        os.environ["SHORTV_VERBOSE"] = "1"


def run(command: click.Command) -> None:
    """Run a job; 0 complete, 1 failed while working, 2 refused before work starts, 3 finished with failures."""
    if not any(param.name == "verbose" for param in command.params):
        command.params.append(
            click.Option(
                ["--verbose"],
                is_flag=True,
                expose_value=False,
                callback=_let_logs_through,
                help="Show what Ray and its workers log.",
            )
        )
    try:
        status = command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ShortVError as error:
        click.echo(f"Error: {printable(error)}", err=True)
        sys.exit(error.exit_status)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped; the same command continues.", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
