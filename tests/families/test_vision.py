"""Vision features that are reused: the same logits, one run of the tower per distinct image, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shortv.errors import Refused
from shortv.families import Batch, LoadedModel
from shortv.families.pixels import LAYOUTS
from shortv.families.preprocessing import batch_of, message_of, prompt_of
from shortv.families.vision import VisionCache
from shortv.layers.apply import executing
from shortv.plan import Mode
from shortv.sample import Sample
from tests import models
from tests.families.test_processors import PAIR, TALL, TEXT, WIDE
from tests.models import LAYERS
from tests.processors import CHECKPOINTS, loaded_checkpoint

TWICE = Sample(sample_id="twice", images=(*WIDE.images, *WIDE.images), prompt="Are they alike?")
THREE = Sample(sample_id="three", images=(*PAIR.images, *WIDE.images), prompt="Which is the odd one?")
# Every image of the later batches was in an earlier one, in other company and with other text.
BATCHES = ((WIDE,), (TALL, PAIR), (TEXT, PAIR, WIDE, TALL), (TEXT,), (WIDE, TEXT, TALL))
FREEZE = (Mode.FULL, *[Mode.FREEZE_VISUAL] * (LAYERS - 1))
DROP = (*[Mode.FULL] * (LAYERS - 1), Mode.DROP_VISUAL)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """A checkpoint of each family with its own processor."""
    return loaded_checkpoint(request.param)


@pytest.fixture(scope="module", params=["llava", "llava-next", "llava-onevision", "qwen3-vl", "idefics3"])
def random(request: pytest.FixtureRequest) -> tuple[str, LoadedModel]:
    """A random model of each layout of pixels, for hand-made batches of its kind."""
    return request.param, models.loaded(models.random_model(request.param))


def encoded(loaded: LoadedModel, samples: Sequence[Sample]) -> Batch:
    return batch_of(loaded, [prompt_of(loaded, [message_of(sample)]) for sample in samples], padding_side="left")


def logits(loaded: LoadedModel, batch: Batch, cache: VisionCache | None = None) -> Tensor:
    with torch.inference_mode(), cache.reusing(batch) if cache else nullcontext():
        logits_BTV: Tensor = loaded.model(**batch.on(loaded).inputs, use_cache=False).logits
    return logits_BTV[batch.types.real_BT]


def check(loaded: LoadedModel, batch: Batch, cache: VisionCache) -> list[int]:
    """Compare logits with and without the cache; gives the tower's calls with it."""
    with tower(loaded) as calls:
        found = logits(loaded, batch, cache)
    torch.testing.assert_close(found, logits(loaded, batch), atol=1e-5, rtol=0)
    return calls


def vision(loaded: LoadedModel) -> nn.Module:
    children = dict(loaded.decoder.backbone.named_children())
    return next(children[name] for name in ("vision_tower", "visual", "vision_model") if name in children)


@contextmanager
def tower(loaded: LoadedModel) -> Iterator[list[int]]:
    """Collect the size of what the vision tower is given in each of its calls."""
    calls: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(len(args[0] if args else kwargs["pixel_values"]))

    handle = vision(loaded).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def test_logits_are_the_models_and_the_tower_runs_once_per_image(loaded: LoadedModel) -> None:
    cache = VisionCache(loaded)
    batches = [encoded(loaded, samples) for samples in BATCHES]
    with tower(loaded) as alone:
        first = [logits(loaded, batch) for batch in batches[:2]]
    assert [check(loaded, batch, cache) for batch in batches * 2] == [alone[:1], alone[1:], *[[]] * 8]
    assert cache.misses > 3 and cache.hits > 2 * cache.misses
    assert (
        cache.bytes
        == sum(part.untyped_storage().nbytes() for kept in cache._kept.values() for part in kept.features)
        > 0
    )
    assert torch.equal(logits(loaded, batches[0], VisionCache(loaded)), first[0])


def test_only_distinct_images_that_are_not_known_run(loaded: LoadedModel) -> None:
    batch, cache = encoded(loaded, (TWICE, TEXT, TWICE)), VisionCache(loaded)
    with tower(loaded) as whole:
        logits(loaded, batch)
    assert [4 * size for size in check(loaded, batch, cache)] == whole
    assert cache.hits == 3 * cache.misses
    known = check(loaded, encoded(loaded, (PAIR, TALL)), cache := VisionCache(loaded))
    new = check(loaded, encoded(loaded, (THREE, TALL, THREE)), cache)
    assert len(known) == len(new) == 1 and new[0] < known[0]


def test_plans_share_the_features(loaded: LoadedModel) -> None:
    batch, cache = encoded(loaded, (WIDE, PAIR)), VisionCache(loaded)
    for modes in (FREEZE, DROP):
        with executing(loaded.model, modes):
            calls = check(loaded, batch, cache)
            own = logits(loaded, batch)
    with cache.reusing(batch), executing(loaded.model, DROP):
        torch.testing.assert_close(logits(loaded, batch), own, atol=1e-5, rtol=0)
    assert cache.hits == 2 * cache.misses and calls == []


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_the_same(loaded: LoadedModel, beams: int) -> None:
    cache = VisionCache(loaded)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    for samples in [(WIDE, PAIR), (TEXT,), (WIDE, PAIR)]:
        batch = encoded(loaded, samples)
        expected = loaded.model.generate(**batch.on(loaded).inputs, **options)
        with cache.reusing(batch):
            assert torch.equal(loaded.model.generate(**batch.on(loaded).inputs, **options), expected)
    # Older releases of transformers repeat the pixels for each beam: those go the model's own way.
    assert cache.hits == cache.misses and (cache.hits or beams > 1)


def test_another_batch_takes_the_models_own_way(random: tuple[str, LoadedModel]) -> None:
    kind, loaded = random
    other = models.batch_of(kind, [["I", 2], [1, "I", "I"]])
    own, cache = logits(loaded, other), VisionCache(loaded)
    for specs in ([[3, "I"], [2]], [[3], [2]]):
        with cache.reusing(models.batch_of(kind, specs)):
            assert torch.equal(logits(loaded, other), own)
    assert cache.hits == cache.misses == cache.bytes == 0


def test_the_least_recently_used_leaves_first(random: tuple[str, LoadedModel]) -> None:
    kind, loaded = random
    first, second, third = (models.batch_of(kind, [["I", 2]], seed=seed) for seed in range(3))
    check(loaded, first, unbounded := VisionCache(loaded))
    cache = VisionCache(loaded, max_bytes=2 * unbounded.bytes + 1)
    for batch, hits in [(first, 0), (second, 0), (first, 1), (third, 1), (first, 2), (second, 2), (third, 2)]:
        check(loaded, batch, cache)
        assert cache.hits == hits and cache.bytes <= 2 * unbounded.bytes
    small = VisionCache(loaded, max_bytes=unbounded.bytes - 1)
    for _ in range(2):
        check(loaded, models.batch_of(kind, [["I", 2], [3, "I"]]), small)
    assert (small.hits, small.misses, small.bytes) == (0, 4, 0)


def test_a_failure_leaves_nothing_behind(random: tuple[str, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, loaded = random
    batch, cache, backbone = models.batch_of(kind, [["I", 2], ["I", 3]]), VisionCache(loaded), loaded.decoder.backbone
    own, attributes = backbone.get_image_features, set(vars(backbone))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(vision(loaded), "forward", lambda *_, **__: 1 / 0)
        logits(loaded, batch, cache)
    assert backbone.get_image_features == own and set(vars(backbone)) == attributes
    assert cache.hits == cache.misses == cache.bytes == 0
    with cache.reusing(batch), pytest.raises(Refused, match="already reusing"):
        check(loaded, batch, VisionCache(loaded))
    check(loaded, batch, cache)


def test_tiles_are_known_by_what_the_tower_sees() -> None:
    inputs = models.batch_of("llava-next", [["I", 2]]).inputs
    pixels, one = inputs["pixel_values"], inputs["pixel_values"][:, :1]

    def key(**changed: Tensor) -> bytes:
        return LAYOUTS["tiles"]({**inputs, **changed})[0].key

    assert key(pixel_values=torch.cat([pixels, torch.zeros(1, 2, 3, 28, 28)], 1)) == key()
    assert key(image_sizes=torch.tensor([[28, 55]])) != key() != key(pixel_values=pixels.reshape(1, 3, 3, 14, 56))
    pair = {"image_sizes": inputs["image_sizes"].repeat(2, 1), "batch_num_images": torch.tensor([2])}
    assert key(pixel_values=one) != key(pixel_values=one.repeat(2, 1, 1, 1, 1), **pair)
