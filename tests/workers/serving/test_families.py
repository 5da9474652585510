"""Every family's own processor and model answer in the engine as they do alone."""

from __future__ import annotations

import pytest

from shortv.families import LoadedModel, load
from shortv.plan import Mode, modes_of_layers
from shortv.workers.serving.engine import EngineSettings
from tests.families.test_processors import BATCHES
from tests.models import LAYERS
from tests.processors import CHECKPOINTS, save_checkpoint
from tests.workers.serving.asking import row_of, submit
from tests.workers.serving.test_engine import generated, running


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random checkpoint, loaded from its folder."""
    return load(
        str(save_checkpoint(CHECKPOINTS[request.param], tmp_path_factory.mktemp("checkpoint"))), dtype="float32"
    )


def test_interleaved_batches_of_different_plans_equal_generate(loaded: LoadedModel) -> None:
    plans = [
        (Mode.FULL,) * LAYERS,
        modes_of_layers(Mode.FREEZE_VISUAL, range(1, LAYERS), LAYERS),
        modes_of_layers(Mode.DROP_VISUAL, range(2, LAYERS), LAYERS),
    ]
    asked = [
        row_of(loaded, sample, modes, max_tokens=3 + 2 * at)
        for modes in plans
        for at, sample in enumerate(BATCHES["text-first"])
    ]
    with running(EngineSettings(batch_size=8, max_batches=6), loaded) as engine:
        answers = [told.answer() for told in submit(engine, *asked)]
    for told, answer in zip(asked, answers, strict=True):
        wanted = generated(told, loaded)
        assert (answer.text, answer.completion_tokens) == (wanted.text, wanted.output_tokens)
        assert answer.prompt_tokens == wanted.input_tokens
