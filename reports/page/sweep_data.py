"""What a page needs from a sweep folder, checked against itself, with one part of lc_samples in memory at a time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reports.manifest import State, SweepManifest
from reports.page.document import Row
from reports.page.ran import result_rows, result_table
from reports.store import Folder
from shortv.errors import Refused
from shortv.plan import VISUAL_MODES, Plan, parse_mode
from shortv.records import KlDirection

# The heat map of more samples than this is drawn from as many, evenly spaced.
MOST_SAMPLES: Final = 20_000


@dataclass(frozen=True, slots=True)
class Measured:
    """LC of one mode by sample and layer (NaN: none), and how often the top token changed."""

    kl_SL: NDArray[np.float64]
    changed_L: NDArray[np.int64]
    counted_L: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepData:
    """A sweep folder. Of a run that is not finished, only what is there; `layers` are rows of lc_layers.

    `plans` are by file; `parts` are the files of lc_samples, and `measured` is what they hold of `sample_ids`, by mode.
    """

    manifest: SweepManifest
    layers: Sequence[Row]
    samples: pa.Table
    errors: pa.Table
    plans: Mapping[str, Plan]
    parts: Sequence[str]
    sample_ids: Sequence[str]
    measured: Mapping[str, Measured]

    @property
    def modes(self) -> list[str]:
        """Modes that have results, in the order of the sweep."""
        return _modes(self.layers)


def read_sweep_data(folder: Folder, *, measurements: bool = True) -> SweepData:
    """Read a sweep folder. Raises ShortVError if it is not one, is damaged, or contradicts itself."""
    manifest = SweepManifest.load(folder)
    layers = result_rows(folder, "lc_layers", manifest)
    _check_layers(layers, manifest, folder)
    tables = {name: result_table(folder, name, manifest) for name in ("samples", "errors")}
    parts = [name for name in folder.list("lc_samples") if name.endswith(".parquet")]
    sample_ids, measured = pa.array([], pa.string()), {}
    if manifest.state is not State.RUNNING:
        _check_counts(tables, manifest, folder)
        if measurements:
            sample_ids = _chosen(tables["samples"]["sample_id"])
            measured = {mode: _unmeasured(len(sample_ids), manifest.num_layers) for mode in _modes(layers)}
            imageless = (
                tables["samples"].filter(pc.equal(tables["samples"]["n_visual"], 0))["sample_id"].combine_chunks()
            )
            for part in parts:
                _add(
                    folder.read_table(part), measured, sample_ids, imageless, KlDirection(manifest.kl_direction).column
                )
            _check_measured(measured, layers, folder)
    return SweepData(
        manifest=manifest,
        layers=layers,
        **tables,
        plans={name: _plan(folder, name) for name in folder.list("plans") if name.endswith(".json")},
        parts=parts,
        sample_ids=sample_ids.to_pylist(),
        measured=measured,
    )


def _modes(layers: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["mode"]) for row in layers))


def _plan(folder: Folder, name: str) -> Plan:
    try:
        return Plan.from_json(folder.read_bytes(name))
    except Refused as error:
        raise Refused(f"{folder.shown}/{name}: {error}") from error


def _check_layers(layers: Sequence[Row], manifest: SweepManifest, folder: Folder) -> None:
    modes = _modes(layers)
    # Compared by counting: a set of all pairs would be as large as a number in the manifest.
    pairs = {(row["mode"], row["layer"]) for row in layers if 0 <= row["layer"] < manifest.num_layers}
    if not len(pairs) == len(layers) == len(modes) * manifest.num_layers or not set(modes) <= set(manifest.modes):
        raise Refused(
            f"{folder.shown}/lc_layers.parquet does not have each of {manifest.num_layers} layers once for "
            "each mode of the manifest; it is damaged or from another run: run the sweep again"
        )
    if not all(math.isfinite(row[name]) for row in layers for name in ("mean", "ci_low", "ci_high")):
        raise Refused(f"{folder.shown}/lc_layers.parquet has an LC that is not a number; run the sweep again")


def _check_counts(tables: Mapping[str, pa.Table], manifest: SweepManifest, folder: Folder) -> None:
    for state, name in (("used", "samples"), ("errors", "errors")):
        declared, found = manifest.counts.get(state, 0), len(tables[name])
        if declared != found:
            raise Refused(
                f"the manifest of {folder.shown} counts {declared} samples as {state}, {name}.parquet has {found}; "
                "the folder is damaged or being written: run the sweep again"
            )


def _chosen(sample_ids: pa.ChunkedArray) -> pa.Array:
    places = np.unique(np.linspace(0, max(len(sample_ids) - 1, 0), MOST_SAMPLES).astype(int))
    return sample_ids.combine_chunks().take(pa.array(places[: len(sample_ids)]))


def _unmeasured(samples: int, layers: int) -> Measured:
    return Measured(np.full((samples, layers), np.nan), *np.zeros((2, layers), dtype=np.int64))


def _add(table: pa.Table, measured: Mapping[str, Measured], sample_ids: Any, imageless: pa.Array, column: str) -> None:
    """Add the rows of a part of lc_samples; samples without an image, `imageless`, do not count for visual modes."""
    for mode, found in measured.items():
        rows = table.filter(pc.equal(table["mode"], mode))
        if parse_mode(mode) in VISUAL_MODES and len(imageless):
            rows = rows.filter(pc.invert(pc.is_in(rows["sample_id"], value_set=imageless)))
        layers = rows["layer"].to_numpy()
        if len(layers) and not 0 <= layers.min() <= layers.max() < len(found.counted_L):
            raise Refused(f"lc_samples has layer {layers.max()}, which the model does not have; run the sweep again")
        changed = rows["top1_changed"].to_numpy().astype(bool)
        found.counted_L[:] += np.bincount(layers, minlength=len(found.counted_L))
        found.changed_L[:] += np.bincount(layers[changed], minlength=len(found.changed_L))
        places = pc.index_in(rows["sample_id"], value_set=sample_ids).combine_chunks()
        kept = places.is_valid().to_numpy(zero_copy_only=False)
        found.kl_SL[places.drop_null().to_numpy(), layers[kept]] = rows[column].to_numpy()[kept]


def _check_measured(measured: Mapping[str, Measured], layers: Sequence[Row], folder: Folder) -> None:
    for row in layers:
        count = measured[row["mode"]].counted_L[row["layer"]]
        if count != row["n"]:
            raise Refused(
                f"{folder.shown}/lc_samples has {count} samples for {row['mode']} in layer {row['layer']}, "
                f"lc_layers.parquet counts {row['n']}; the folder is damaged or being written: run the sweep again"
            )
