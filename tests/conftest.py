"""What holds for every test: no network, no hub, no display."""

import os
import socket
from typing import Any

import pytest
from hypothesis import settings

# CI judges a change by the same examples every time; runs at a desk go on looking for new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Cut the network off before any test module is imported, and give it back at the end."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    # The hub's client reads these once, when it is imported.
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setenv("MPLBACKEND", "agg")
    # A cluster that Ray starts by itself takes the whole process with it, a minute after it was shut down.
    patch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
    # The models are tiny: more threads than one only wait for each other, badly so on a busy machine.
    patch.setenv("OMP_NUM_THREADS", "1")
    # Credentials of the person who runs the tests are no business of the tests.
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
