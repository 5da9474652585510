"""Every family's processor and model give the same completions in the engine as alone."""

from __future__ import annotations

import pytest

from shortv.families import LoadedModel
from shortv.plan import Mode, modes_of_layers
from shortv.workers.serving.scheduler import EngineSettings
from tests.families.test_processors import BATCHES
from tests.models import LAYERS
from tests.processors import CHECKPOINTS, loaded_checkpoint
from tests.workers.serving.sequences import running, sequence_of, submit
from tests.workers.serving.test_engine import generated


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """A random checkpoint of each family."""
    return loaded_checkpoint(request.param)


def test_interleaved_batches_of_different_plans_equal_generate(loaded: LoadedModel) -> None:
    plans = [
        (Mode.FULL,) * LAYERS,
        modes_of_layers(Mode.FREEZE_VISUAL, range(1, LAYERS), LAYERS),
        modes_of_layers(Mode.DROP_VISUAL, range(2, LAYERS), LAYERS),
    ]
    submitted = [
        sequence_of(loaded, sample, modes, max_tokens=3 + 2 * at)
        for modes in plans
        for at, sample in enumerate(BATCHES["text-first"])
    ]
    with running(EngineSettings(batch_size=8, max_batches=6), loaded) as engine:
        completions = [one.completion() for one in submit(engine, *submitted)]
    for one, completion in zip(submitted, completions, strict=True):
        wanted = generated(one, loaded)
        assert (completion.text, completion.completion_tokens) == (wanted.text, wanted.completion_tokens)
        assert completion.prompt_tokens == wanted.prompt_tokens
