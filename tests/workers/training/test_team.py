"""Two processes end with the mean of their gradients and metrics; a lost one is an error, not a wait."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from shortv.workers.training.team import Distributed, PeerLost


def _member(rank: int, place: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    team = Distributed(torch.device("cpu"))
    assert team.first == (rank == 0)
    both, one, none = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    both.grad = torch.full((2, 3), 1.0 + rank)
    if rank == 0:
        one.grad = torch.full((2, 3), 4.0)
    team.reduce([both, none, one])
    assert both.grad.unique().tolist() == [1.5]
    assert one.grad is not None and one.grad.unique().tolist() == [2.0] and none.grad is None
    assert team.mean({"loss": 1.0 + 2 * rank, "a": 0.0}) == {"loss": 2.0, "a": 0.0}
    if rank == 0:
        with pytest.raises(PeerLost, match="a training worker was lost"):
            team.mean({"loss": 1.0})
    os._exit(0)  # at a usual end gloo's threads may still wait for the lost peer, and the process would abort


def test_gradients_and_metrics_are_averaged(tmp_path: Path) -> None:
    mp.spawn(_member, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
