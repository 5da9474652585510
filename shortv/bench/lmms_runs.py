"""Runs of `python -m lmms_eval` in their own processes, with start-up timed apart from evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from shortv.errors import ShortVError

TASK = "shapes_vqa"
_LIMIT_S = 1800.0
# lmms-eval's command with a clock around its evaluation; loading libraries, the model and the task is start-up.
_TIMED = """
import sys, time
import lmms_eval.evaluator as evaluator
own, file = evaluator.evaluate, sys.argv.pop(1)
def evaluate(*args, **kwargs):
    started = time.perf_counter()
    found = own(*args, **kwargs)
    with open(file, "w") as stream:
        stream.write(str(time.perf_counter() - started))
    return found
evaluator.evaluate = evaluate
from lmms_eval.__main__ import cli_evaluate
cli_evaluate()
"""


class LmmsRun(NamedTuple):
    """Seconds of the evaluation, seconds of all the rest, and the scores by `metric,filter`."""

    seconds: float
    startup: float
    scores: Mapping[str, float]


def run_lmms_eval(model: str, model_args: Mapping[str, object], *, limit: int, include_path: Path) -> LmmsRun:
    """Score the bundled task once with a model of lmms-eval; raises ShortVError when it writes no results."""
    with tempfile.TemporaryDirectory(prefix="shortv-bench-") as folder:
        clock = Path(folder, "seconds")
        arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
        command = [sys.executable, "-c", _TIMED, str(clock), "--model", model, "--model_args", arguments]
        command += ["--tasks", TASK, "--limit", str(limit), "--include_path", str(include_path), "--batch_size", "1"]
        command += ["--output_path", str(Path(folder, "out"))]
        started = time.perf_counter()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        )
        whole = time.perf_counter() - started
        # lmms-eval exits with 0 after a failed run too.
        results = sorted(Path(folder, "out").rglob("*results.json"))
        if not results or not clock.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ShortVError(f"lmms_eval --model {model} wrote no results: {last[:300]}")
        seconds = float(clock.read_text())
        found = json.loads(results[-1].read_text())["results"][TASK]
    scores = {name: value for name, value in found.items() if isinstance(value, float) and "stderr" not in name}
    return LmmsRun(seconds, whole - seconds, scores)
