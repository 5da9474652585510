"""The driver's connection to Ray: an existing cluster, or an embedded one."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from shortv.errors import Refused, ShortVError, one_line
from shortv.workers.placement import Node

VERBOSE = "SHORTV_VERBOSE"
"""Environment variable that lets through what Ray logs; the jobs set it for `--verbose`."""
STARTS = 3
"""Times that starting Ray on this machine is tried."""
_QUIET = ("ray", "ray.data", "ray.train", "ray.serve")


@contextmanager
def connected() -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of the submitted job, else start Ray on this machine while the block runs.

    A connection that is already there is used and left as it is.

    Raises:
        ShortVError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    try:
        _connect()
    except ShortVError:
        raise
    except Exception as error:  # ray.init raises bare Exceptions for a node that does not come up
        raise ShortVError(
            f"Ray at {os.environ.get('RAY_ADDRESS') or 'this machine'} cannot be reached: {one_line(error)}; "
            "check RAY_ADDRESS and the token (RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS to run on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def join() -> None:
    """Connect this process to the cluster of RAY_ADDRESS, or to the one that runs on this machine.

    Raises:
        Refused: there is none.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ADDRESS", "auto")
    try:
        _connect()
    except Exception as error:  # ray.init raises ConnectionError and bare Exceptions
        raise Refused(f"there is no Ray cluster at {os.environ['RAY_ADDRESS']}: {one_line(error)}") from error


def _connect() -> None:
    verbose = bool(os.environ.get(VERBOSE))
    level = logging.INFO if verbose else logging.ERROR
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    if os.environ.get("RAY_ADDRESS"):
        with _muted():
            ray.init(**options)
    else:
        start(**options)
    for name in _QUIET:
        logging.getLogger(name).setLevel(level)


@contextmanager
def _muted() -> Iterator[None]:
    """Hide what Ray's C++ layer writes to stderr while it starts; exceptions pass, and `VERBOSE` shows everything.

    The documented RAY_BACKEND_LOG_LEVEL silences the layer later, when it would report every retried task in several
    lines. While Ray starts, it announces that very setting on stderr, for which there is no switch.
    """
    if os.environ.get(VERBOSE):
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def start(**options: Any) -> None:
    """Start Ray on this machine, again where its processes take too long. Raises what `ray.init` raises at last."""
    for attempt in range(1, STARTS + 1):
        try:
            with _muted():
                ray.init(address="local", include_dashboard=False, **options)
            return
        except ShortVError:
            raise
        except Exception:
            # Ray allows its processes 30 seconds to start, which a busy machine exceeds.
            ray.shutdown()
            if attempt == STARTS:
                raise


def free_nodes() -> list[Node]:
    """What each living node has free, and what it has in all."""
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes = []
    for node in living_nodes():
        total = node["Resources"]
        # A node that has just joined has not reported yet.
        left = free.get(node["NodeID"], total)
        nodes.append(Node(cpus=left.get("CPU", 0), gpus=left.get("GPU", 0), total_gpus=total.get("GPU", 0)))
    return nodes


def living_nodes() -> list[dict[str, Any]]:
    """Ray's description of each node that is alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]
