"""Campaigns of tasks that call an LLM judge: nothing is judged twice, and what was not judged has no score."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reports.store import Folder
from shortv.evals.judging import Judge, JudgePolicy
from shortv.workers.campaign.spec import CampaignSpec
from tests.evals.flaky_judge import KEY, FlakyJudge, flaky_judge
from tests.evals.lmms_tasks import N_DOCS, write_tasks
from tests.workers.campaign.fakes import campaign, campaign_spec, tables
from tests.workers.campaign.local import LocalWorkers


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyJudge]:
    with flaky_judge() as found:
        monkeypatch.setenv("JUDGE_URL", f"{found.url}/chat/completions")
        yield found


def spec(tmp_path: Path, *plans: str, **more: Any) -> CampaignSpec:
    folder = tmp_path / "tasks"
    if not folder.exists():
        write_tasks(folder)
    given = {"tasks": ("judged",), "include_path": (str(folder),), "plans": plans}
    return campaign_spec(tmp_path / "out", **given | more)


def test_an_answer_is_judged_once_for_all_plans_and_runs(tmp_path: Path, server: FlakyJudge) -> None:
    campaign(spec(tmp_path, "first@3"), LocalWorkers())
    assert len(server.asked) == N_DOCS
    found = tables(tmp_path / "out")
    rows = Folder(tmp_path / "out").read_tables("judge").to_pylist()
    assert sorted(row["doc"] for row in rows) == list(range(N_DOCS)) and {row["task"] for row in rows} == {"judged"}
    assert {row["plan"]: row["n"] for row in found["metrics"]} == {"full": N_DOCS, "first-3": N_DOCS}
    # Answers that are lost are asked again, and judged as before.
    for part in (tmp_path / "out" / "answers").iterdir():
        part.unlink()
    campaign(spec(tmp_path, "first@3"), LocalWorkers())
    assert len(server.asked) == N_DOCS
    assert [tables(tmp_path / "out")[name] for name in ("metrics", "comparisons")] == [
        found[name] for name in ("metrics", "comparisons")
    ]
    # A plan that answers three documents in another way has three calls.
    odd = LocalWorkers(answer=lambda text, plan: "grey" if plan and "thing 1?" in text else "red")
    campaign(spec(tmp_path, "first@3", "last@3"), odd)
    assert {plan for _, plan, _, _ in odd.asked} == {"last-3"}
    asked = len(server.asked)
    # A damaged part of replies is said, set aside, and what it held is judged again.
    part = sorted((tmp_path / "out" / "judge").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-20])
    said = campaign(spec(tmp_path, "first@3", "last@3", "random:0@3"), LocalWorkers())
    assert f"{part.name} " in said and "Warning" in said and len(server.asked) > asked and not part.exists()


def test_a_failed_judge_call_is_an_error_row_and_never_a_zero(
    tmp_path: Path, server: FlakyJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [200, 401, 200, "drip"]
    impatient = JudgePolicy(tries=1, timeout_s=2.0)
    monkeypatch.setattr("shortv.workers.campaign.producer.Judge", partial(Judge, policy=impatient))
    said = campaign(spec(tmp_path), LocalWorkers(), status=3)
    assert f"2 of {N_DOCS} samples failed; the first, 'q1': score: judge: 127.0.0.1" in said and KEY not in said
    found = tables(tmp_path / "out")
    failed = {row["doc"]: row["error"] for row in found["answers"] if row["error"]}
    assert set(failed) == {1, 3} and "status 401" in failed[1] and "did not answer in time" in failed[3]
    assert all(row["scores"] == [] for row in found["answers"] if row["error"])
    assert [row["n"] for row in found["metrics"]] == [N_DOCS - 2]
    asked = len(server.asked)
    workers = LocalWorkers()
    campaign(spec(tmp_path, retry_failed=True), workers)
    # The model is not asked again.
    assert len(server.asked) == asked + 2 and [doc for *_, doc in workers.asked] == [1, 3] and workers.works == []
    again = tables(tmp_path / "out")
    assert [row["n"] for row in again["metrics"]] == [N_DOCS] and not any(row["error"] for row in again["answers"])
    scoring = ("scores", "error", "responses", "values")
    before, after = ([{**row, **dict.fromkeys(scoring)} for row in one["answers"]] for one in (found, again))
    assert after == before


def test_a_judge_that_is_called_when_metrics_are_aggregated(tmp_path: Path, server: FlakyJudge) -> None:
    server.script = [401]
    aggregating = {"tasks": ("judged_together",)}
    said = campaign(spec(tmp_path, **aggregating), LocalWorkers(), status=3)
    assert "the metrics of task 'judged_together' cannot be computed: judge: 127.0.0.1" in said
    workers = LocalWorkers()
    campaign(spec(tmp_path, retry_failed=True, **aggregating), workers)
    assert len(server.asked) == 2 and workers.asked == []
    campaign(spec(tmp_path, "first@3", **aggregating), workers)
    assert len(server.asked) == 2 and len(workers.asked) == N_DOCS
