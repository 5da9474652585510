"""What a process and its children use is counted by what they do."""

from __future__ import annotations

import subprocess
import sys

from shortv.bench.processes import DRIVER, Meter, memory_bytes, roles

SPINS = """
import subprocess, sys, time
child = "import time\\nwhile time.process_time() < 0.3: pass\\nprint('spun', flush=True)\\ninput()"
subprocess.run([sys.executable, "-c", child])
"""


def test_a_meter_counts_children_by_their_program_and_keeps_what_ended() -> None:
    command = [sys.executable, "-c", SPINS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    with Meter(process.pid) as meter:
        assert process.stdout.readline() == "spun\n"
        [child] = set(roles(process.pid)) - {process.pid}
        assert roles(process.pid)[process.pid] == DRIVER and 0 < memory_bytes(child) <= memory_bytes(child, peak=True)
        before = len(meter.samples)
        while len(meter.samples) < before + 2:
            pass
        process.stdin.write("\n")
        process.stdin.close()
        process.wait()
    role = next(role for role in meter.samples[-1].cpu if role != DRIVER)
    assert role.startswith("python") and meter.samples[-1].cpu[role] >= 0.29
    assert memory_bytes(child) == 0
