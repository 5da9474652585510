"""What a finished run should hold by its own count, and does not."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from reports.manifest import Manifest
from reports.service.contents import Contents
from reports.service.files import shown
from reports.training import TrainingManifest

_SWEEP: Final = ("samples", "lc_layers", "errors", "lc_samples")
_CAMPAIGN: Final = ("cells", "metrics", "comparisons", "speed")
_IN_PARTS: Final = ("lc_samples",)
_NAMED: Final = 3


def sweep_gaps(manifest: Manifest, contents: Contents) -> Iterator[str]:
    """Compare the tables of a sweep with its manifest."""
    yield from _missing(contents, _SWEEP)
    counts = manifest.counts
    for table, count in (("samples", "used"), ("errors", "errors")):
        yield from _other_count(contents, table, counts.get(count, 0), f"counts {counts.get(count, 0)} {count}")
    samples, modes, layers = counts.get("used", 0), len(manifest.modes), manifest.num_layers
    said = f"counts {samples} samples x {modes} modes x {layers} layers"
    yield from _other_count(contents, "lc_samples", samples * modes * layers, said)


def campaign_gaps(contents: Contents, cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Compare the answers of a campaign with its cells; a cell that failed may have none."""
    answers = {item.part: item for item in contents.parts("answers")}
    lacking: list[str] = []
    other: list[str] = []
    for cell in cells:
        file = answers.get(f"{cell['cell']}.parquet")
        if cell["same_as"] is not None or cell["state"] == "failed":
            continue
        name = f"{cell['model']} {cell['plan']} {cell['task']}"
        if file is None:
            lacking.append(name)
        elif file.rows is not None and file.rows != cell["n"]:
            other.append(f"{name} has {file.rows} of {cell['n']}")
    if lacking:
        yield f"the answers of {_counted(lacking)} are missing although the run has ended: {_first(lacking)}"
    if other:
        yield f"the answers of {_counted(other)} are not as many as its samples: {_first(other)}"


def campaign_tables_missing(contents: Contents) -> Iterator[str]:
    """Name the tables that every finished campaign has."""
    return _missing(contents, _CAMPAIGN)


def training_gaps(manifest: TrainingManifest, contents: Contents) -> Iterator[str]:
    """Compare the tables of a training with its manifest."""
    steps, errors = manifest.counts.get("steps", 0), manifest.counts.get("errors", 0)
    yield from _missing(contents, ("training", "errors") if errors else ("training",))
    yield from _other_count(contents, "training", steps, f"counts {steps} steps")
    yield from _other_count(contents, "errors", errors, f"counts {errors} errors")


def _missing(contents: Contents, tables: Sequence[str]) -> Iterator[str]:
    there = {item.table for item in contents.tables}
    absent = [table for table in tables if table not in there]
    if absent:
        names = (f"{table}/*.parquet" if table in _IN_PARTS else f"{table}.parquet" for table in absent)
        yield f"{', '.join(names)} {'is' if len(absent) == 1 else 'are'} missing although the run has ended"


def _other_count(contents: Contents, table: str, wanted: Any, said: str) -> Iterator[str]:
    held = contents.rows(table)
    if held is not None and held != wanted:
        name = table if table in _IN_PARTS else f"{table}.parquet"
        yield f"the manifest {said}, {shown((*contents.run, name))} holds {held} rows"


def _counted(cells: Sequence[str]) -> str:
    return f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}"


def _first(cells: Sequence[str]) -> str:
    more = f" and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
    return ", ".join(cells[:_NAMED]) + more
