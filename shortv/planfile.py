"""Plan files: written whole, and read back as a Plan or refused with a reason."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from shortv.errors import Refused, ShortVError
from shortv.plan import SCHEMA, LearnedParts, Mode, PartsKind, Plan, parse_mode

PLAN_FILE = "shortv_plan.json"
_AGAIN = "make the plan again or restore the file"


def published_plans() -> tuple[str, ...]:
    """Return the names of the plans that ship with the package, in alphabetical order."""
    folder = resources.files("shortv") / "plans"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json")))


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Return the plan at `path`: a file, a folder that holds shortv_plan.json, or a published plan's name.

    What stands on disk goes before a published name. Raises Refused when nothing there is a plan.
    """
    source = Path(path)
    if source.is_dir():
        source = source / PLAN_FILE
    try:
        if not source.exists() and str(path) in published_plans():
            source = Path(str(resources.files("shortv") / "plans" / f"{path}.json"))
            text = source.read_text("utf-8")
        else:
            text = source.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise Refused(
            f"cannot read plan {source}: {why}; give a plan file, a folder with {PLAN_FILE}, "
            f"or one of {', '.join(published_plans())}"
        ) from error
    try:
        return _with_parts_below(parse_plan(text), source.parent)
    except Refused as error:
        raise Refused(f"{path}: {error}") from error


def write_plan(plan: Plan, path: Path) -> Path:
    """Write the plan file whole or not at all, and return its path; raises ShortVError when it cannot.

    A path that does not end in `.json` is a folder, made where it is missing.
    """
    target = path if path.suffix == ".json" and not path.is_dir() else path / PLAN_FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_atomic(target, _with_parts_relative_to(plan, target.parent).to_json().encode())
    except OSError as error:
        raise ShortVError(f"cannot write plan file {target}: {error.strerror}; choose a writable path") from error
    return target


def _with_parts_below(plan: Plan, folder: Path) -> Plan:
    """A plan file names parts from where it stands, so that both can be moved together."""
    if plan.parts is None:
        return plan
    return replace(plan, parts=replace(plan.parts, path=str((folder / plan.parts.path).resolve())))


def _with_parts_relative_to(plan: Plan, folder: Path) -> Plan:
    if plan.parts is None:
        return plan
    path, folder = Path(plan.parts.path).resolve(), folder.resolve()
    # A result folder is moved as a whole, and keeps its plans in plans/.
    whole = folder.parent if folder.name == "plans" else folder
    if path.is_relative_to(whole):
        path = Path(os.path.relpath(path, folder))
    return replace(plan, parts=replace(plan.parts, path=path.as_posix()))


def _write_atomic(target: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private, a plan is for everyone
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def parse_plan(text: str) -> Plan:
    """Return the plan in the text of a plan file.

    Raises Refused for broken JSON, another schema, unknown, missing, repeated or mistyped keys, an
    unknown mode, fields that contradict each other, and modes whose digest no longer matches.
    """
    content = _decode(text)
    if content.get("schema") != SCHEMA or isinstance(content.get("schema"), bool):
        raise Refused(f"schema is {content.get('schema')!r}, this version reads {SCHEMA}; {_AGAIN}")
    unknown = sorted(content.keys() - _READERS.keys() - {"digest"})
    if unknown:
        raise Refused(f"unknown key {unknown[0]!r}; remove it, or {_AGAIN}")
    missing = sorted(_REQUIRED - content.keys())
    if missing:
        raise Refused(f"the key {missing[0]!r} is missing; {_AGAIN}")
    known: dict[str, Any] = {key: read(key, content[key]) for key, read in _READERS.items() if key in content}
    plan = Plan(**known)
    if content["digest"] != plan.digest:
        raise Refused(
            f"the digest does not match the modes and parts: the file says {str(content['digest'])[:12]}, they give "
            f"{plan.digest[:12]}, so somebody edited it; {_AGAIN}"
        )
    return plan


def _decode(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the plan is no valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise Refused(f"the plan is a JSON {type(content).__name__}, not an object; {_AGAIN}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise Refused(f"the key {repeated!r} stands twice in the plan; keep one of them")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise Refused(f"the plan holds {name}, which is no number; {_AGAIN}")


def _mistyped(key: str, wanted: str, value: object) -> Refused:
    return Refused(f"{key} is {value!r:.80}, where {wanted} is needed; {_AGAIN}")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _mistyped(key, "text", value)
    return value


def _optional_text(key: str, value: object) -> str | None:
    return None if value is None else _text(key, value)


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _mistyped(key, "a whole number", value)
    return value


def _optional_number(key: str, value: object) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise _mistyped(key, "a number or null", value)


def _list(key: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise _mistyped(key, "a list", value)
    return value


def _modes(key: str, value: object) -> tuple[Mode, ...]:
    return tuple(parse_mode(_text(key, mode)) for mode in _list(key, value))


def _layers(key: str, value: object) -> tuple[int, ...]:
    return tuple(_whole(key, layer) for layer in _list(key, value))


def _optional_mapping(key: str, value: object) -> Mapping[str, Any] | None:
    if value is None or isinstance(value, dict):
        return value
    raise _mistyped(key, "an object or null", value)


def _parts(key: str, value: object) -> LearnedParts | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"kind", "path", "digest", "threshold"}:
        raise _mistyped(key, "an object with kind, path, digest and threshold, or null", value)
    kind = _text("kind", value["kind"])
    if kind not in set(PartsKind):
        raise Refused(f"unknown kind of learned parts {kind!r}; the kinds are {', '.join(PartsKind)}")
    return LearnedParts(
        kind=PartsKind(kind),
        path=_text("path", value["path"]),
        digest=_text("digest", value["digest"]),
        threshold=_optional_number("threshold", value["threshold"]),
    )


_READERS: Mapping[str, Callable[[str, object], object]] = {
    "schema": _whole,
    "name": _text,
    "model": _text,
    "revision": _optional_text,
    "config_digest": _text,
    "num_layers": _whole,
    "modes": _modes,
    "ranking": _layers,
    "source": _optional_mapping,
    "flops_ratio": _optional_number,
    "flops_t": _optional_number,
    "flops_v": _optional_number,
    "parts": _parts,
}
_REQUIRED = frozenset({"schema", "name", "model", "config_digest", "num_layers", "modes", "digest"})
