"""Units of work cover each batch and layer once, and give every worker something to do."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shortv.workers.sweep.units import Unit, layer_costs, plan_units
from tests.workers.fakes import MODES


@given(
    n_batches=st.integers(1, 6),
    num_layers=st.integers(1, 12),
    workers=st.integers(1, 9),
    per_unit=st.none() | st.integers(1, 5),
    done=st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 11))),
)
def test_every_open_layer_is_measured_once(
    n_batches: int, num_layers: int, workers: int, per_unit: int | None, done: dict[int, set[int]]
) -> None:
    units = plan_units(
        n_batches=n_batches,
        num_layers=num_layers,
        modes=MODES,
        workers=workers,
        finished=done,
        layers_per_unit=per_unit,
    )
    found = [(unit.batch, layer) for unit in units for layer in unit.layers]
    wanted = [(b, layer) for b in range(n_batches) for layer in range(num_layers) if layer not in done.get(b, ())]
    assert sorted(found) == wanted
    assert all(0 < len(unit.layers) <= (per_unit or num_layers) for unit in units)
    if per_unit is None:
        assert len(units) >= min(workers, len(wanted))
    assert [Unit.parse(unit.unit_id) for unit in units] == units


def test_more_batches_than_workers_share_the_clean_pass() -> None:
    units = plan_units(n_batches=5, num_layers=8, modes=MODES, workers=4, finished={})
    assert units == [Unit(batch, 0, 8) for batch in range(5)]


def test_few_batches_are_split_by_cost() -> None:
    units = plan_units(n_batches=1, num_layers=32, modes=MODES, workers=4, finished={})
    costs = layer_costs(32, MODES)
    shares = [sum(costs[unit.first : unit.stop]) for unit in units]
    assert len(units) >= 4 and max(shares) < 2 * min(shares)
    assert all(len(a.layers) <= len(b.layers) for a, b in pairwise(units)), "early layers cost more"
