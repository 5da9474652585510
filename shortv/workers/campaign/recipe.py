"""What a user asked a campaign to do, from a TOML file and flags."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from reports.manifest import plain
from shortv.errors import Refused
from shortv.workers.campaign.settings import READERS
from shortv.workers.request import WorkerRange

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One campaign: models, plans and tasks, and how to run them. Every field is a setting of the same name."""

    models: tuple[str, ...]
    revision: str | None = None
    plans: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("shapes_vqa",)
    include_path: tuple[str, ...] = ()
    """Folders with lmms-eval tasks; the bundled task is found without."""
    limit: float | None = None
    """Samples per task: a count, or below 1 a share."""
    seed: int = 0
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Replaces entries of the task's generation_kwargs."""
    replicas: WorkerRange | None = None
    """None: one per free GPU, or one on CPUs."""
    gpus_per_replica: float = 1
    batch_size: int = 16
    num_concurrent: int | None = None
    """Questions asked at once; None: as many as the replicas take."""
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    output_path: str
    fail_on_error: float = 0.0
    """Share of a cell's samples that may end in errors with exit status 0."""
    retry_failed: bool = False

    def arguments(self) -> dict[str, Any]:
        """The settings by name, as JSON values."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}


def read_recipe(
    config: str | None, flags: Mapping[str, object], defaults: Mapping[str, object], *, environment: Mapping[str, str]
) -> Recipe:
    """Read a recipe; a flag goes before the TOML file at `config`, and that before a default.

    `flags` that are None were not given. Texts in the file may hold `${VAR}` and `${VAR:-x}`.

    Raises:
        Refused: no TOML, an unknown setting, a wrong type, an unset variable, or a required setting is missing.
    """
    written = _expanded(_load(config), environment, config) if config else {}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = _read(defaults, "") | _read(written, config or "") | _read(given, "")
    missing = [name for name in ("models", "tasks", "output_path") if not settings.get(name, name == "tasks")]
    if missing:
        raise Refused(f"the campaign has no {missing[0]}; set it in the recipe, or give {_flag(missing[0])}")
    return Recipe(**settings)


def _load(config: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(config).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise Refused(f"recipe {config} cannot be read: {why}; give a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"recipe {config} is no valid TOML: {error}; correct it") from error


def _read(values: Mapping[str, object], source: str) -> dict[str, Any]:
    where = f"recipe {source}: " if source else ""
    found = {}
    for name, value in values.items():
        if name not in READERS:
            near = difflib.get_close_matches(name, READERS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the settings are {', '.join(READERS)}"
            raise Refused(f"{where}unknown setting {name!r}; {hint}")
        try:
            found[name] = READERS[name](value)
        except (ValueError, TypeError) as error:
            shown = name if source else _flag(name)
            raise Refused(f"{where}{shown} is {value!r:.80}; give {error}") from error
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _expanded(value: Any, environment: Mapping[str, str], config: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _expanded(item, environment, config) for name, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, environment, config) for item in value]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        name, default = match.groups()
        # As in a shell, an empty variable takes the default too.
        found = environment.get(name) or default
        if found is None:
            raise Refused(
                f"recipe {config} names the environment variable {name}, which is not set; set it, "
                f"or write ${{{name}:-default}}"
            )
        return found

    return _VARIABLE.sub(replaced, value)
