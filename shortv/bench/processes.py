"""CPU time and memory of a process and of all that it started, by what each does; from Linux's /proc."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
DRIVER = "driver"
"""The role of the process itself."""
_SAMPLE_S = 0.5
_TICK = os.sysconf("SC_CLK_TCK")


def roles(root: int) -> dict[int, str]:
    """Return what a process and its descendants do, by process id.

    The first is the "driver"; Ray's workers are named by their class (`ServeReplica`), others by their program.
    """
    parents = {
        int(entry.name): parent for entry in _PROC.iterdir() if entry.name.isdigit() and (parent := _parent(entry))
    }
    found: dict[int, str] = {root: DRIVER}
    while more := {pid: _role(pid) for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, its threads included; 0 if it has ended."""
    fields = _stat(_PROC / str(pid))
    return (int(fields[11]) + int(fields[12])) / _TICK if fields else 0.0


def memory_bytes(pid: int, *, peak: bool = False) -> int:
    """Return the memory that a process has in RAM, or the most that it ever had; 0 if it has ended."""
    try:
        lines = (_PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    field = "VmHWM:" if peak else "VmRSS:"
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def peak_bytes(role: str, root: int | None = None) -> int:
    """Return the most memory that a process of a role had in RAM, among the descendants of a process or of this one."""
    found = [memory_bytes(pid, peak=True) for pid, one in roles(root or os.getpid()).items() if one == role]
    return max(found, default=0)


class Sample(NamedTuple):
    """CPU seconds by role since the processes began, and the memory of the first one, at a (monotonic) time."""

    at: float
    cpu: Mapping[str, float]
    memory: int


class Meter:
    """Notes what a process, by default this one, and its descendants use while its block runs.

    What the meter itself uses does not count.
    """

    def __init__(self, root: int | None = None) -> None:
        self.samples: list[Sample] = []
        self._root = root or os.getpid()
        self._latest: dict[int, tuple[str, float]] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, name="shortv-meter", daemon=True)

    def __enter__(self) -> Meter:
        """Begin to note."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._ending.set()
        self._thread.join()

    def used(self, begin: float = -math.inf, end: float = math.inf) -> tuple[Sample, Sample]:
        """Return the first and the last sample of a time, by default of all."""
        inside = [sample for sample in self.samples if begin <= sample.at <= end]
        return inside[0], inside[-1]

    def _sample_on(self) -> None:
        while True:
            for pid, role in roles(self._root).items():
                used = cpu_seconds(pid)
                # A process that has ended keeps what it used.
                if used:
                    # Its name is gone before it is.
                    self._latest[pid] = role or self._latest.get(pid, ("",))[0], used
            cpu: defaultdict[str, float] = defaultdict(float)
            for role, used in self._latest.values():
                cpu[role] += used
            if self._root == os.getpid():
                cpu[DRIVER] -= time.thread_time()
            self.samples.append(Sample(time.monotonic(), cpu, memory_bytes(self._root)))
            if self._ending.wait(_SAMPLE_S):
                return


def _stat(entry: Path) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may hold spaces."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(entry: Path) -> int:
    fields = _stat(entry)
    return int(fields[1]) if fields else 0


def _role(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    title = words[0]
    if title.startswith("ray::"):
        return title.removeprefix("ray::").partition(":")[0].partition(".")[0]
    return os.path.basename(title)
