"""Every sample once an epoch, the same order whatever was before, shares that make up the batch."""

from __future__ import annotations

import pytest

from shortv.errors import Refused
from shortv.learned.order import Order


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    order = Order(samples=10, batch_size=4, seed=1)
    stream = [row for step in range(10) for row in order.rows(step)]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order.rows(7) == tuple(stream[28:32])
    assert Order(samples=10, batch_size=4, seed=2).rows(0) != order.rows(0)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_shares_of_the_workers_make_up_the_batch(workers: int) -> None:
    order = Order(samples=9, batch_size=4, seed=0)
    shares = [order.share(5, worker, workers) for worker in range(workers)]
    assert tuple(row for share in shares for row in share) == order.rows(5)


@pytest.mark.parametrize(("samples", "message"), [(3, "3 training samples are fewer than a batch of 4")])
def test_too_few_samples_are_refused(samples: int, message: str) -> None:
    with pytest.raises(Refused, match=message):
        Order(samples=samples, batch_size=4, seed=0)
