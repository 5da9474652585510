"""A bounded cache of vision features: a replica runs the vision tower once per distinct image.

Plans change decoder layers and the tower runs before them, so one cache serves every plan of a model. The key of an
image is a digest of its processed pixels: equal digests are equal inputs of the tower.
"""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shortv.errors import Refused
from shortv.families.loading import LoadedModel
from shortv.families.pixels import PIXEL_INPUTS, Pixels, images_of, stacked
from shortv.families.preprocessing import Batch

_CACHED = "_shortv_cached"

# An image's visual tokens, then its rows of each DeepStack layer; and a function from such to the model's own output.
Features = tuple[Tensor, ...]
Form = Callable[[Sequence[Features]], Any]


class _Kept(NamedTuple):
    features: Features
    tower_ms: float

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.features)


@dataclass(slots=True)
class TowerTimes:
    """What the vision tower took, in milliseconds, the device synchronised."""

    now_ms: float = 0.0
    """In the forwards inside the context."""
    by_image: dict[bytes, float] = field(default_factory=dict)
    """By the key of each image: its share, by pixels, of the run that computed its features."""


class VisionCache:
    """Vision features of the most recent images, on the device where the tower computes them.

    `hits` and `misses` count images from the cache and images that the tower ran for; where a processor cuts an image
    into several rows of pixels (InternVL, Idefics3, SmolVLM, Gemma 3's crops), each row counts. `bytes` is the present
    size. For one thread at a time, and for weights that do not change; reused features carry no gradient.
    """

    def __init__(self, loaded: LoadedModel, *, max_bytes: int = 1 << 30) -> None:
        self.hits = self.misses = self.bytes = 0
        self._loaded = loaded
        self._max_bytes = max_bytes
        self._backbone: Any = loaded.decoder.backbone
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._form: Form = list

    @contextmanager
    def reusing(self, batch: Batch, *, own: bool = False) -> Iterator[TowerTimes]:
        """Make the model take features of known images from the cache, and run the tower for the others.

        Inside the context, call the model only with `batch` moved to its device, whose `pixel_values` are not read if
        the batch was joined. With tensors of other shapes, or a layout that no processor of the family produces, the
        model's own method runs and nothing is counted.

        Args:
            own: only take the time of the model's own method, for what reads states inside the tower.

        Raises:
            Refused: inside another such context.
        """
        method, patched = self._backbone.get_image_features, vars(self._backbone).get("get_image_features")
        if hasattr(method, _CACHED):
            raise Refused("this model is already reusing vision features; leave that context first")
        images = images_of(self._loaded.decoder.family, batch.inputs) if batch.images is None else batch.images
        shapes = {name: batch.inputs[name].shape for name in PIXEL_INPUTS if name in batch.inputs}
        times = TowerTimes()

        @wraps(method)  # generate() reads the signature to tell which inputs are the tower's
        def cached(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(method).bind(*args, **kwargs).arguments
            further = given.pop("kwargs", {})
            found = {name: value.shape for name, value in given.items() if isinstance(value, Tensor)}
            if own or not images or found != shapes:
                return self._timed(partial(method, *args, **kwargs), images, times)
            return self._served(images, times, lambda missing: method(**_arguments(given, missing), **further))

        setattr(cached, _CACHED, True)
        self._backbone.get_image_features = cached
        try:
            yield times
        finally:
            del self._backbone.get_image_features
            if patched:
                self._backbone.get_image_features = patched

    def _timed(self, run: Callable[[], Any], images: Sequence[Pixels], times: TowerTimes) -> Any:
        """Run the tower for images and share its time out among them."""
        self._loaded.synchronize()
        started = time.perf_counter()
        output = run()
        self._loaded.synchronize()
        took_ms = 1e3 * (time.perf_counter() - started)
        times.now_ms += took_ms
        total = sum(image.size for image in images) or 1
        times.by_image |= {image.key: took_ms * image.size / total for image in images}
        return output

    def _served(self, images: Sequence[Pixels], times: TowerTimes, run: Callable[[Sequence[Pixels]], Any]) -> Any:
        # The tiled ones come first: only at the end of a call can a single image be taken whole.
        distinct = sorted({image.key: image for image in images}.values(), key=lambda image: not image.tiled)
        missing = [image for image in distinct if image.key not in self._kept]
        found = {image.key: self._kept[image.key] for image in distinct if image.key in self._kept}
        times.by_image |= {key: kept.tower_ms for key, kept in found.items()}
        if missing:
            computed, self._form = _parted(self._timed(partial(run, missing), missing, times))
            for image, features in zip(missing, computed, strict=True):
                found[image.key] = _Kept(features, times.by_image[image.key])
        self.hits += len(images) - len(missing)
        self.misses += len(missing)
        for image in distinct:
            self._keep(image.key, found[image.key])
        return self._form([found[image.key].features for image in images])

    def _keep(self, key: bytes, found: _Kept) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
        elif found.nbytes <= self._max_bytes:
            while self.bytes + found.nbytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.bytes -= oldest.nbytes
            # A copy: a view would hold the features of every image of its batch in memory.
            self._kept[key] = found._replace(features=tuple(part.detach().clone() for part in found.features))
            self.bytes += found.nbytes


def _parted(output: Any) -> tuple[list[Features], Form]:
    pooled, layers = output.pooler_output, getattr(output, "deepstack_features", None) or ()
    flat = any(isinstance(layer, Tensor) for layer in layers)  # transformers 5.17 does not part these by image
    parted = [layer.split([len(part) for part in pooled]) for layer in layers] if flat else layers
    form = partial(_joined, kind=type(output), stacked=isinstance(pooled, Tensor), flat=flat)
    return list(zip(pooled, *parted, strict=True)), form


def _joined(images: Sequence[Features], *, kind: Callable[..., Any], stacked: bool, flat: bool) -> Any:
    pooled, *layers = (list(parts) for parts in zip(*images, strict=True))
    output = kind()  # filled by item, since Idefics3's has no field for it in transformers 5.17
    output["pooler_output"] = torch.stack(pooled) if stacked else pooled
    if layers:
        output["deepstack_features"] = [torch.cat(parts) for parts in layers] if flat else layers
    return output


def _arguments(given: Mapping[str, Any], images: Sequence[Pixels]) -> dict[str, Any]:
    """The arguments of a call with these images alone, from those of the call with the whole batch."""
    # Pixels are moved to the device here, and only those that the tower runs for.
    parts = {name: stacked([image.parts[name] for image in images]).to(given[name]) for name in images[0].parts}
    if "batch_num_images" in given:
        tiled = sum(image.tiled for image in images)
        # As one prompt with several images; one too many is announced where there is a single one.
        whole = [max(2, len(images) - tiled)] if tiled < len(images) else []
        parts["batch_num_images"] = torch.tensor([1] * tiled + whole)
    return {**given, **parts}
