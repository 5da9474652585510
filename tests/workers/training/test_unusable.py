"""The real trainers in the loop: each says itself which samples it cannot use, and the run goes on without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from shortv.families import LoadedModel
from shortv.learned.dyvte import train
from shortv.learned.dyvte.recipe import DyvteRecipe
from shortv.learned.eas.recipe import EasRecipe
from shortv.learned.registry import SYSTEMS
from shortv.learned.saisa.recipe import SaisaRecipe
from shortv.learned.training import alone
from shortv.plan import PartsKind
from shortv.sample import Sample
from shortv.workers.training.loop import SingleWorker, StepSamples, run_loop
from tests.tiny_model import bundled, calibration
from tests.workers.training.test_loop import Recorded

DYVTE = DyvteRecipe(steps=2, batch_size=4, width=8)
RECIPES: dict[PartsKind, Any] = {
    PartsKind.DYVTE: DYVTE,
    PartsKind.SAISA: SaisaRecipe(projector_steps=1, joint_steps=1, batch_size=4, language_model="none"),
    PartsKind.EAS: EasRecipe(choice="given", layers=(2,), steps=2, batch_size=4, kept_rank=2, pia_rank=4),
}
TEXT = Sample(sample_id="text", prompt="How many are there?", answer="Two.")


def unusable(kind: PartsKind, recipe: Any, bad: Sample) -> list[tuple[str, str]]:
    """Train two steps with a sample among good ones; which samples were reported, and why."""
    batch, report = (*calibration()[:3], bad), Recorded()
    trainer = SYSTEMS[kind].trainer(bundled(), recipe, alone)
    data = [StepSamples(step=step, samples=batch) for step in range(recipe.steps)]
    run_loop(trainer, data, start=0, checkpoint_every=2, report=report, group=SingleWorker())
    assert report.steps == [1, 2] and list(report.states) == [2]
    return [(error.sample_id, error.error) for error in report.errors]


@pytest.mark.parametrize("kind", RECIPES)
def test_a_sample_without_an_image_ends_no_training(kind: PartsKind) -> None:
    expected = [("text", "no-image")] if kind is PartsKind.DYVTE else []
    assert unusable(kind, RECIPES[kind], TEXT) == expected


@pytest.mark.parametrize("kind", RECIPES)
def test_a_sample_without_an_answer_ends_no_training(kind: PartsKind) -> None:
    quiet = replace(calibration()[3], sample_id="quiet", answer=" ")
    assert unusable(kind, RECIPES[kind], quiet) == [("quiet", "no-answer")]


@pytest.mark.parametrize("neighbours", [False, True], ids=["always", "beside-others"])
def test_a_sample_to_which_the_model_says_nothing_ends_no_training(
    neighbours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always, it is reported; beside others alone, where padding moves the rounding, it is asked again and used."""
    silent = replace(calibration()[3], sample_id="silent", answer=None)

    def written(loaded: LoadedModel, samples: Sequence[Sample], max_tokens: int) -> list[str]:
        says = {"silent": "two" if neighbours and len(samples) == 1 else " "}
        return [says.get(sample.sample_id, "one") for sample in samples]

    monkeypatch.setattr(train, "_written", written)
    expected = [] if neighbours else [("silent", "no-answer")]
    assert unusable(PartsKind.DYVTE, DYVTE.model_copy(update={"targets": "model"}), silent) == expected
