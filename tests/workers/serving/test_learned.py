"""Plans with learned parts: one copy for all plans that share them, and a place beside the others in the engine."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shortv.errors import Refused
from shortv.layers.progress import LearnedRun
from shortv.learned.dyvte.parts import ExitRouters
from shortv.learned.dyvte.recipe import RouterSettings
from shortv.learned.files import PartsCache
from shortv.plan import Mode, Plan, modes_of_layers
from shortv.request import Completion, Work
from shortv.spec import ModelSpec
from shortv.workers.models import ModelLoader, RemoteModel
from shortv.workers.serving.replica import Replica, ServedPlan, fit_plans
from shortv.workers.serving.run import check_model
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.spec import EndpointSpec
from tests.parts import ShiftRun, plan_of, register, save_named, save_shifts
from tests.tiny_model import TINY, bundled, calibration
from tests.workers.serving.sequences import Submitted, running, sequence_of, submit
from tests.workers.serving.test_engine import generated

FULL = (Mode.FULL,) * 8


def runs(cache: PartsCache) -> Callable[[Plan], LearnedRun | None]:
    return lambda plan: cache.run(plan, bundled().decoder, bundled().architecture)


def fitted(plans: Sequence[Plan], run_of: Callable[[Plan], LearnedRun | None]) -> dict[str, ServedPlan]:
    return fit_plans(plans, bundled().architecture, model="tiny", revision=None, run_of=run_of)[0]


def at(plan: Plan, threshold: float) -> Plan:
    """The plan with another threshold and a name of its own."""
    assert plan.parts is not None
    return replace(plan, name=f"at-{threshold}", parts=replace(plan.parts, threshold=threshold))


def routers(folder: Path) -> Plan:
    """DyVTE with routers that find every exit as likely as not."""
    parts = ExitRouters.build(bundled().decoder, RouterSettings(width=4))
    for router in parts.routers:
        torch.nn.init.zeros_(router.outer.weight)
    return plan_of(bundled(), save_named(folder, bundled(), parts, threshold=0.5))


def completions(*submitted: Submitted) -> list[Completion]:
    with running(EngineSettings(batch_size=8)) as engine:
        return [one.completion() for one in submit(engine, *submitted)]


def test_sequences_with_parts_run_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    plan = plan_of(bundled(), save_shifts(tmp_path, bundled(), layers=tuple(range(8))))
    run_of = runs(PartsCache())
    frozen = modes_of_layers(Mode.FREEZE_VISUAL, (4, 5), 8)
    under: list[tuple[Any, LearnedRun | None]] = [
        (FULL, None),
        (frozen, None),
        *((FULL, run_of(at(plan, threshold))) for threshold in (0.3, 1.0)),
    ]
    submitted = [
        sequence_of(bundled(), one, modes, run=run, max_tokens=6) for one in calibration()[:3] for modes, run in under
    ]
    found = completions(*submitted)
    for one, completion in zip(submitted, found, strict=True):
        assert (completion.text, completion.exit_layer) == (generated(one).text, None)
    assert [completion.text for completion in found[::4]] != [completion.text for completion in found[3::4]]


def test_parts_that_need_the_tower_are_given_no_kept_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    run = runs(PartsCache())(plan_of(bundled(), save_shifts(tmp_path, bundled(), layers=(2,))))
    for needs_tower, kept in ((False, (1, 2)), (True, (0, 0))):
        monkeypatch.setattr(ShiftRun, "needs_tower", needs_tower)
        two = [sequence_of(bundled(), one, run=run) for one in calibration()[:2]]
        again = sequence_of(bundled(), calibration()[0], run=run)
        with running(EngineSettings(batch_size=8)) as engine:
            for one in (*submit(engine, *two), *submit(engine, again)):
                one.completion()
        assert (engine.vision.hits, engine.vision.misses) == kept


def test_answers_say_after_which_layer_visual_tokens_left(tmp_path: Path) -> None:
    plan, run_of = routers(tmp_path), runs(PartsCache())
    sample = calibration()[0]
    none = replace(sample, images=(), prompt="how many circles are there?")
    likely, unlikely = (run_of(at(plan, threshold)) for threshold in (0.5, 0.51))
    dropped = modes_of_layers(Mode.DROP_VISUAL, range(1, 8), 8)
    found = completions(
        sequence_of(bundled(), sample, run=likely),
        sequence_of(bundled(), sample, run=unlikely),
        sequence_of(bundled(), none, run=likely),
        sequence_of(bundled(), sample),
        sequence_of(bundled(), sample, dropped),
    )
    assert [completion.exit_layer for completion in found] == [0, 8, None, None, None]
    assert found[0].text == found[4].text
    assert found[1].text == found[3].text


def test_parts_that_are_not_there_or_cannot_run_refuse_the_plan(tmp_path: Path) -> None:
    plan = routers(tmp_path)
    frozen = replace(plan, modes=modes_of_layers(Mode.FREEZE_VISUAL, (4,), 8))
    with pytest.raises(Refused, match="plan 'learned': DyVTE itself decides what leaves"):
        fitted([frozen], runs(PartsCache()))
    (tmp_path / "parts.json").unlink()
    with pytest.raises(Refused, match=r"^plan 'learned': no learned parts at .*; give a folder with parts\.json"):
        fitted([plan], runs(PartsCache()))


def test_a_command_checks_plans_and_parts_before_any_replica_starts(tmp_path: Path) -> None:
    plan, model = routers(tmp_path / "parts"), str(TINY / "model")
    said = io.StringIO()

    def check(*plans: Plan) -> str:
        files = [str(plan.save(tmp_path / f"{number}.json")) for number, plan in enumerate(plans)]
        check_model(EndpointSpec(model=model, plans=tuple(files)), Console(file=said))
        return said.getvalue()

    # A plan for this very folder is nothing to warn of.
    assert check(replace(plan, model=model, revision=None)) == ""
    assert "made for revision abc" in check(replace(plan, revision="abc"))
    with pytest.raises(Refused, match="two different plans are named 'learned'"):
        check(plan, replace(plan, modes=modes_of_layers(Mode.DROP_VISUAL, (7,), 8)))
    header = tmp_path / "parts" / "parts.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"config_digest": "cd" * 32}))
    with pytest.raises(Refused, match=r"plan 'learned': the parts in .* were trained on"):
        check(plan)


def test_plans_that_cannot_be_loaded_leave_a_replica_as_it_was(tmp_path: Path) -> None:
    plan, other = routers(tmp_path / "parts"), routers(tmp_path / "cut")
    weights = tmp_path / "cut" / "parts.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    spec = ModelSpec(name=str(TINY / "model"), dtype="float32")
    replica = Replica(RemoteModel(loader=ModelLoader(), spec=spec, folder=None), device="cpu")

    async def change(*plans: Plan) -> dict[str, str]:
        await replica.reconfigure({"plans": [json.loads(one.to_json()) for one in plans]})
        return await replica.plans()

    async def ask() -> Completion:
        request = sequence_of(bundled(), calibration()[0]).sequence.request
        replies = await replica.complete_all([Work(request=request, plans=("learned",))])
        found = replies.results[0]["learned"]
        assert isinstance(found, Completion)
        return found

    assert asyncio.run(change(plan)) == {"learned": plan.digest}
    before = asyncio.run(ask())
    with pytest.raises(Refused, match=r"plan 'learned': .* cut short.*; train the parts again"):
        asyncio.run(change(at(plan, 0.7), other))
    assert asyncio.run(replica.plans()) == {"learned": plan.digest}
    after = asyncio.run(ask())
    assert (after.text, after.exit_layer, after.plan_digest) == (before.text, 0, plan.digest)
    assert asyncio.run(change()) == {}
