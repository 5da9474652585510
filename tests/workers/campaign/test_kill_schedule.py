"""A campaign of 20,000 answers under kills of replicas, producers and the driver, against the same one undisturbed."""

import pytest
import ray

from shortv.bench.kills import bench
from shortv.bench.specs import KillsBench


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_lose_and_repeat_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    ray.shutdown()
    (row,) = bench(KillsBench())
    with capsys.disabled():
        print(f"\n{row}")
    wrong = ("answers_lost", "answers_repeated", "errors", "tables_that_differ", "replicas_left")
    assert {name: row.figures[name] for name in wrong} == dict.fromkeys(wrong, 0)
    assert row.figures["drivers_killed"] == 2
    assert row.figures["replicas_killed"] > 0 and row.figures["producers_killed"] > 0
