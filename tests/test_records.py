"""Plain values: errors, samples and rows survive what a cluster does to them."""

import copy
import dataclasses

import pytest

from shortv.errors import SampleError
from shortv.records import KlDirection, LcRecord
from shortv.sample import CALIBRATION_COLUMNS, Sample


def test_sample_errors_survive_a_process_boundary() -> None:
    error = SampleError(stage="decode", error="OSError", message="image 0 is truncated; replace it")
    again = copy.copy(error)  # rebuilt from its arguments, as between processes
    assert (again.stage, again.error, str(again)) == ("decode", "OSError", "image 0 is truncated; replace it")


def test_sample_digest_covers_everything() -> None:
    sample = Sample(sample_id="a", images=(b"1", b"2"), prompt="p", answer=None, dataset=None)
    changes = [
        {"sample_id": "b"},
        {"images": (b"12",)},
        {"images": (b"2", b"1")},
        {"prompt": "q"},
        {"answer": ""},
        {"dataset": "d"},
        {"answer": "x", "dataset": None},
        {"answer": None, "dataset": "x"},
    ]
    digests = [dataclasses.replace(sample, **change).digest for change in changes]  # type: ignore[arg-type]
    assert len({sample.digest, *digests}) == 1 + len(changes)
    assert dataclasses.replace(sample).digest == sample.digest


def test_calibration_columns_are_the_fields_of_a_sample() -> None:
    assert list(CALIBRATION_COLUMNS) == [field.name for field in dataclasses.fields(Sample)]


@pytest.mark.parametrize("direction", list(KlDirection))
def test_kl_directions_name_their_columns(direction: KlDirection) -> None:
    assert direction.column in {field.name for field in dataclasses.fields(LcRecord)}
