"""The bundled model and its calibration samples, loaded once per test session."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from reports.calibration import read_calibration
from shortv.families import LoadedModel, load
from shortv.sample import Sample

TINY = Path(__file__).resolve().parent.parent / "shortv" / "tiny"


@cache
def bundled() -> LoadedModel:
    """The bundled model in float32 on the CPU."""
    return load(str(TINY / "model"), dtype="float32")


@cache
def calibration() -> tuple[Sample, ...]:
    """The bundled calibration samples."""
    return tuple(read_calibration(TINY / "calibration.parquet"))
