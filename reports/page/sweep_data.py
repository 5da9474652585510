"""What a page needs from a sweep folder, checked against itself, with one part of lc_samples in memory at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reports.manifest import State, SweepManifest
from reports.schemas import schema_of
from reports.store import Folder
from shortv.errors import Refused
from shortv.plan import VISUAL_MODES, Plan, parse_mode
from shortv.records import KlDirection

# The heat map of more samples than this is drawn from as many, evenly spaced.
MOST_SAMPLES: Final = 20_000
MAX_LAYER_ROWS: Final = 100_000


@dataclass(slots=True, kw_only=True)
class Measured:
    """LC of one mode by sample and layer (NaN: none), and how often the top token changed."""

    kl_SL: NDArray[np.float64]
    changed_L: NDArray[np.int64]
    counted_L: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepData:
    """A sweep folder. Of a run that is not finished, only what is there; `layers` are rows of lc_layers."""

    manifest: SweepManifest
    layers: Sequence[Mapping[str, Any]]
    samples: pa.Table
    errors: pa.Table
    plans: Mapping[str, Plan]
    """By file."""
    parts: Sequence[str] = ()
    sample_ids: Sequence[str] = ()
    measured: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def modes(self) -> list[str]:
        """Modes that have results, in the order of the sweep."""
        return list(dict.fromkeys(str(row["mode"]) for row in self.layers))


def read_sweep_data(folder: Folder, *, measurements: bool = True) -> SweepData:
    """Read a sweep folder. Raises ShortVError if it is not one, is damaged, or contradicts itself."""
    manifest = SweepManifest.load(folder)
    finished = manifest.state is not State.RUNNING
    data = SweepData(
        manifest=manifest,
        layers=_layers(folder, finished),
        samples=_table(folder, "samples", finished),
        errors=_table(folder, "errors", finished),
        plans={name: _plan(folder, name) for name in folder.list("plans") if name.endswith(".json")},
        parts=[name for name in folder.list("lc_samples") if name.endswith(".parquet")],
    )
    _check_layers(data, folder)
    if not finished:
        return data
    _check_counts(data, folder)
    return _with_measurements(data, folder) if measurements else data


def _table(folder: Folder, name: str, needed: bool) -> pa.Table:
    if folder.exists(f"{name}.parquet"):
        return folder.read_table(name)
    if needed:
        raise Refused(f"{folder.shown} has no {name}.parquet although its run has ended; run the sweep again")
    return schema_of(name).empty_table()


def _layers(folder: Folder, needed: bool) -> list[Mapping[str, Any]]:
    table = _table(folder, "lc_layers", needed)
    if len(table) > MAX_LAYER_ROWS:
        raise Refused(f"{folder.shown}/lc_layers.parquet has {len(table)} rows, more than any model has layers")
    rows: list[Mapping[str, Any]] = table.to_pylist()
    return rows


def _plan(folder: Folder, name: str) -> Plan:
    try:
        return Plan.from_json(folder.read_bytes(name))
    except Refused as error:
        raise Refused(f"{folder.shown}/{name}: {error}") from error


def _check_layers(data: SweepData, folder: Folder) -> None:
    layers = data.manifest.num_layers
    # Compared by counting: a set of all pairs would be as large as a number in the manifest.
    pairs = {(row["mode"], row["layer"]) for row in data.layers if 0 <= row["layer"] < layers}
    known = set(data.modes) <= set(data.manifest.modes)
    if not len(pairs) == len(data.layers) == len(data.modes) * layers or not known:
        raise Refused(
            f"{folder.shown}/lc_layers.parquet does not have each of {layers} layers once for "
            "each mode of the manifest; it is damaged or from another run: run the sweep again"
        )
    if not all(math.isfinite(row[name]) for row in data.layers for name in ("mean", "ci_low", "ci_high")):
        raise Refused(f"{folder.shown}/lc_layers.parquet has an LC that is not a number; run the sweep again")
    shares = (data.manifest.stability or {}).values()
    if not all(isinstance(share, Mapping) and _are_numbers(share) for share in shares):
        raise Refused(f"the manifest of {folder.shown} has a stability that is not a share; run the sweep again")


def _are_numbers(shares: Mapping[str, Any]) -> bool:
    return all(isinstance(value, int | float) for value in shares.values()) and all(map(_is_share, shares))


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _check_counts(data: SweepData, folder: Folder) -> None:
    for name, table in (("used", data.samples), ("errors", data.errors)):
        declared = data.manifest.counts.get(name, 0)
        if declared != len(table):
            file = "samples" if name == "used" else name
            raise Refused(
                f"the manifest of {folder.shown} counts {declared} samples as {name}, {file}.parquet has {len(table)}; "
                "the folder is damaged or being written: run the sweep again"
            )


def _with_measurements(data: SweepData, folder: Folder) -> SweepData:
    chosen = np.unique(np.linspace(0, max(len(data.samples) - 1, 0), MOST_SAMPLES).astype(int))[: len(data.samples)]
    sample_ids = data.samples["sample_id"].combine_chunks().take(pa.array(chosen))
    shape = (len(sample_ids), data.manifest.num_layers)
    measured = {
        mode: Measured(
            kl_SL=np.full(shape, np.nan),
            changed_L=np.zeros(shape[1], dtype=np.int64),
            counted_L=np.zeros(shape[1], dtype=np.int64),
        )
        for mode in data.modes
    }
    without_image = data.samples.filter(pc.equal(data.samples["n_visual"], 0))["sample_id"].combine_chunks()
    column = KlDirection(data.manifest.kl_direction).column
    for part in data.parts:
        _add(folder.read_table(part), measured, sample_ids, without_image, column)
    _check_measured(measured, data, folder)
    return SweepData(
        **{name: getattr(data, name) for name in ("manifest", "layers", "samples", "errors", "plans", "parts")},
        sample_ids=sample_ids.to_pylist(),
        measured=measured,
    )


def _add(table: pa.Table, measured: Mapping[str, Measured], sample_ids: Any, without_image: Any, column: str) -> None:
    for mode, found in measured.items():
        rows = table.filter(pc.equal(table["mode"], mode))
        if parse_mode(mode) in VISUAL_MODES and len(without_image):
            rows = rows.filter(pc.invert(pc.is_in(rows["sample_id"], value_set=without_image)))
        layers = rows["layer"].to_numpy()
        if len(layers) and not 0 <= layers.min() <= layers.max() < len(found.counted_L):
            raise Refused(f"lc_samples has layer {layers.max()}, which the model does not have; run the sweep again")
        changed = rows["top1_changed"].to_numpy().astype(bool)
        found.counted_L += np.bincount(layers, minlength=len(found.counted_L))
        found.changed_L += np.bincount(layers[changed], minlength=len(found.changed_L))
        places = pc.index_in(rows["sample_id"], value_set=sample_ids).combine_chunks()
        kept = places.is_valid().to_numpy(zero_copy_only=False)
        found.kl_SL[places.drop_null().to_numpy(), layers[kept]] = rows[column].to_numpy()[kept]


def _check_measured(measured: Mapping[str, Measured], data: SweepData, folder: Folder) -> None:
    for row in data.layers:
        count = measured[row["mode"]].counted_L[row["layer"]]
        if count != row["n"]:
            raise Refused(
                f"{folder.shown}/lc_samples has {count} samples for {row['mode']} in layer {row['layer']}, "
                f"lc_layers.parquet counts {row['n']}; the folder is damaged or being written: run the sweep again"
            )
