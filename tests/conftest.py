"""Rules for every test (no network, no hub), the Ray that tests share, and an order of tests drawn from a seed."""

import gc
import os
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# CI uses the same examples every time; other runs keep searching for new ones. A busy machine is slow, not wrong.
settings.register_profile("ci", derandomize=bool(os.environ.get("CI")), deadline=None)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--shuffle SEED` and `--gpu-device DEVICE`."""
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run modules, and tests in a module, in random order")
    parser.addoption("--gpu-device", default="cuda", help="cuda, or cpu to run their bodies without a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle modules, and tests within their module: fixtures of a module are still set up once."""
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    draw = random.Random(seed)
    groups = list(modules.values())
    draw.shuffle(groups)
    for group in groups:
        draw.shuffle(group)
    items[:] = [item for group in groups for item in group]


def pytest_collection_finish() -> None:
    """Take what was imported out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray on this machine with four CPUs, started by the first test that needs it and shared by all of them.

    A test that starts a cluster of its own calls `ray.shutdown()` first; the next user of this fixture starts it again.
    """
    import ray

    from shortv.workers.cluster import start

    if not ray.is_initialized():
        start(num_cpus=4, log_to_driver=False, logging_level="ERROR")
    yield


def pytest_sessionfinish() -> None:
    """Stop the shared Ray."""
    gc.unfreeze()
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def pytest_configure(config: pytest.Config) -> None:
    """Disconnect the network before any test module is imported, and restore it at the end."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    # The hub's client reads these once, when it is imported.
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setenv("MPLBACKEND", "agg")
    # Otherwise Ray may start a second cluster in the background and end this process when that one stops.
    patch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
    # The models are tiny: more threads than one only wait for each other, badly so on a busy machine.
    patch.setenv("OMP_NUM_THREADS", "1")
    # Tests must not see the credentials of the person who runs them.
    patch.delenv("HF_TOKEN", raising=False)
    allowed = {"127.0.0.1", "::1", "localhost", "0.0.0.0", *_own_addresses()}
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        # Connecting a datagram socket sends nothing; Ray finds the machine's own address that way.
        outside = isinstance(address, tuple) and str(address[0]) not in allowed
        if outside and self.type == socket.SOCK_STREAM:
            raise OSError(f"tests must not reach the network, but this one connects to {address[0]}")
        connect(self, address)

    patch.setattr(socket.socket, "connect", connect_here)


def _own_addresses() -> set[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # An address reserved for documentation: the kernel chooses a source address, no packet leaves.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return set()
        return {probe.getsockname()[0]}
