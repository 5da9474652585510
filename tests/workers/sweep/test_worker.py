"""The two stages without Ray: what they do with samples that fail, and with deaths that are remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from shortv.workers.models import Environment
from shortv.workers.sweep.units import Unit
from shortv.workers.sweep.worker import LOADING, NOISE, PREPARING, WHOLE, Attempts
from tests.workers.fakes import LAYERS, FakeEngine, make_samples, run_unit

UNIT = Unit(0, 0, LAYERS)


def run(engine: FakeEngine, *deaths: str) -> dict[str, Any]:
    """The finished unit of four samples, after processes that died one after the other while they did something."""
    attempts = Attempts()
    for process, doing in enumerate(deaths):
        key = f"{PREPARING} {UNIT.unit_id}" if doing == PREPARING else UNIT.unit_id
        attempts.begin(key, f"dead {process}")
        attempts.enter(key, doing)
    (row,) = run_unit(UNIT, make_samples(4), engine, attempts).to_pylist()
    return dict(row)


WHOLE_RUN = run(FakeEngine())


def failures(found: dict[str, Any]) -> dict[str, str]:
    """Errors by sample; every other sample has all its rows."""
    errors = {row["sample_id"]: row["error"] for row in found["errors"]}
    for name in ("samples", "lc_samples"):
        wanted = [row for row in WHOLE_RUN[name] if row["sample_id"] not in errors]
        assert sorted(found[name], key=repr) == sorted(wanted, key=repr)
    return errors


@pytest.mark.parametrize(("most", "part"), [(1, 1), (2, 2), (3, 2)])
def test_memory_is_halved_down_to_single_samples(most: int, part: int) -> None:
    found = run(FakeEngine(most_samples=most))
    assert failures(found) == {}
    # So is the batch of the noise floor, to the largest parts that fit.
    assert found["noise_floor"] == pytest.approx(1e-9 * part)


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    assert set(failures(run(FakeEngine(most_samples=0))).values()) == {"out-of-memory"}


def test_an_exception_stays_with_its_sample() -> None:
    found = run(FakeEngine(raises=frozenset({"s02"})))
    assert failures(found) == {"s02": "RuntimeError"}
    assert found["noise_floor"] == pytest.approx(3e-9), "of the samples that could be used"


@pytest.mark.parametrize(
    ("deaths", "errors", "noise_floor"),
    [
        ([WHOLE], {}, 4e-9),
        ([WHOLE, WHOLE], {}, 4e-9),
        ([WHOLE, WHOLE, NOISE], {}, 4e-9),
        ([WHOLE, WHOLE, "sample s01"], {"s01": "process-died"}, 3e-9),
        ([NOISE, NOISE], {}, None),  # a floor that kills its process twice is left out
        ([PREPARING, PREPARING], {}, 4e-9),
        ([LOADING, LOADING], {}, 4e-9),
    ],
)
def test_deaths_lead_to_the_sample_at_fault(
    deaths: list[str], errors: dict[str, str], noise_floor: float | None
) -> None:
    # Where preparing killed its process twice, only the process that holds the weights prepares.
    engine = Suspicious() if PREPARING in deaths else FakeEngine()
    found = run(engine, *deaths)
    assert failures(found) == errors
    assert found["noise_floor"] == pytest.approx(noise_floor)


@dataclass(frozen=True, kw_only=True)
class Suspicious(FakeEngine):
    """Must not prepare on CPUs."""

    def preprocess(self, preprocessor: Any, samples: Any, *, alone: bool) -> bytes:
        assert preprocessor == "loaded"
        return super().preprocess(preprocessor, samples, alone=alone)


@dataclass(frozen=True, kw_only=True)
class Clumsy(FakeEngine):
    """Cannot prepare s01 together with others, and nothing on CPUs."""

    def preprocess(self, preprocessor: Any, samples: Any, *, alone: bool) -> bytes:
        if preprocessor == "preprocessor" or (not alone and len(samples) > 1 and samples[1].sample_id == "s01"):
            raise RuntimeError("cannot prepare")
        return super().preprocess(preprocessor, samples, alone=alone)


def test_what_cannot_be_prepared_together_is_prepared_apart() -> None:
    assert failures(run(Clumsy())) == {}


def test_deaths_while_loading_end_the_sweep_and_no_sample() -> None:
    assert "died while loading" in run(FakeEngine(), LOADING, LOADING, LOADING)["fatal"]
    assert "model.safetensors" in run(FakeEngine(broken=True))["fatal"]


def test_a_living_process_that_asks_again_did_not_die() -> None:
    attempts = Attempts()
    for _ in range(3):
        deaths = attempts.begin(UNIT.unit_id, "same")
        attempts.enter(UNIT.unit_id, WHOLE)
    assert deaths == {LOADING: 0}


def test_secrets_for_workers_are_never_shown() -> None:
    secret = Environment({"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in f"{secret!r} {secret}"
