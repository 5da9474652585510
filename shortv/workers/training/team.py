"""Several workers that train one set of parts: gradients and metrics averaged over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 2**24
"""Numbers from which on an exchange is large enough."""


class PeerLost(RuntimeError):
    """Another worker did not take part: its process has died, or its node cannot be reached."""


class Distributed:
    """A Team over torch's process group, which Ray Train has set up."""

    def __init__(self, device: torch.device) -> None:
        """Average on the device that the process group's backend wants."""
        self._device = device

    @property
    def first(self) -> bool:
        """Whether this is worker 0."""
        return dist.get_rank() == 0

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics averaged over the workers."""
        names = sorted(metrics)
        values_N = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=self._device)
        _sum(values_N)
        return dict(zip(names, (values_N / dist.get_world_size()).tolist(), strict=True))

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients in place; a parameter that no worker has a gradient for keeps none."""
        listed = list(parameters)
        has_N = torch.tensor([float(p.grad is not None) for p in listed], device=self._device)
        _sum(has_N)
        trained = [parameter for parameter, found in zip(listed, has_N.tolist(), strict=True) if found]
        for bucket in _buckets(trained):
            flat_N = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
            _sum(flat_N)
            flat_N /= dist.get_world_size()
            for parameter, mean in zip(bucket, torch.split(flat_N, [p.numel() for p in bucket]), strict=True):
                parameter.grad = mean.view_as(parameter)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype whose gradients travel together: one exchange each would be mostly waiting."""
    for _, same in groupby(parameters, key=lambda parameter: (parameter.dtype, parameter.device)):
        bucket, size = [], 0
        for parameter in same:
            bucket.append(parameter)
            size += parameter.numel()
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def _sum(tensor: Tensor) -> None:
    try:
        reduce: Any = dist.all_reduce
        reduce(tensor)
    except RuntimeError as error:  # torch's errors of process groups are all of this class
        raise PeerLost(f"a training worker was lost: {str(error).splitlines()[0]}") from error
