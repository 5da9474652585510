"""A bounded cache of vision features: a replica runs the vision tower once per distinct image.

Plans change decoder layers and the tower runs before them, so one cache serves every plan of a model. The key of an
image is a digest of its processed pixels: equal digests are equal inputs of the tower.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from shortv.errors import Refused
from shortv.families.loading import LoadedModel
from shortv.families.preprocessing import Batch

_CACHED = "_shortv_cached"
_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "batch_num_images")

# An image's visual tokens, then its rows of each DeepStack layer; and a function from such to the model's own output.
Features = tuple[Tensor, ...]
Form = Callable[[Sequence[Features]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """One image as the tower gets it (one row of pixels where the processor cuts images into several)."""

    key: bytes
    where: Mapping[str, tuple[slice, ...]]
    """Its index in each tensor of the batch that has a part for it."""
    tiled: bool = True
    """False where LLaVA-OneVision does not tile an image, because its prompt has several."""


class VisionCache:
    """Vision features of the most recent images, on the device where the tower computes them.

    `hits` and `misses` count images from the cache and images that the tower ran for; where a processor cuts an image
    into several rows of pixels (InternVL, Idefics3, SmolVLM, Gemma 3's crops), each row counts. `bytes` is the present
    size. For one thread at a time, and for weights that do not change; reused features carry no gradient.
    """

    def __init__(self, loaded: LoadedModel, *, max_bytes: int = 1 << 30) -> None:
        self.hits = self.misses = self.bytes = 0
        self._max_bytes = max_bytes
        self._backbone: Any = loaded.decoder.backbone
        self._layout = LAYOUTS[loaded.decoder.family.pixels]
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self._form: Form = list

    @contextmanager
    def reusing(self, batch: Batch) -> Iterator[None]:
        """Make the model take features of known images from the cache, and run the tower for the others.

        Inside the context, call the model only with `batch` moved to its device: images are known by their index in
        it. With tensors of other shapes, or a layout that no processor of the family produces, the model's own method
        runs and nothing is counted.

        Args:
            batch: in CPU memory, as `preprocessing.batch_of` returns it.

        Raises:
            Refused: inside another such context.
        """
        own, patched = self._backbone.get_image_features, vars(self._backbone).get("get_image_features")
        if hasattr(own, _CACHED):
            raise Refused("this model is already reusing vision features; leave that context first")
        images = self._layout(batch.inputs) if "pixel_values" in batch.inputs else []
        shapes = {name: batch.inputs[name].shape for name in _INPUTS if name in batch.inputs}

        @wraps(own)  # generate() reads the signature to tell which inputs are the tower's
        def cached(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(own).bind(*args, **kwargs).arguments
            further = given.pop("kwargs", {})
            found = {name: value.shape for name, value in given.items() if isinstance(value, Tensor)}
            if not images or found != shapes:
                return own(*args, **kwargs)
            return self._served(images, lambda missing: own(**_arguments(given, missing), **further))

        setattr(cached, _CACHED, True)
        self._backbone.get_image_features = cached
        try:
            yield
        finally:
            del self._backbone.get_image_features
            if patched:
                self._backbone.get_image_features = patched

    def _served(self, images: Sequence[Pixels], run: Callable[[Sequence[Pixels]], Any]) -> Any:
        # The tiled ones come first: only at the end of a call can a single image be taken whole.
        distinct = sorted({image.key: image for image in images}.values(), key=lambda image: not image.tiled)
        missing = [image for image in distinct if image.key not in self._kept]
        found = {image.key: self._kept[image.key] for image in distinct if image.key in self._kept}
        if missing:
            computed, self._form = _parted(run(missing))
            found |= zip((image.key for image in missing), computed, strict=True)
        self.hits += len(images) - len(missing)
        self.misses += len(missing)
        for image in distinct:
            self._keep(image.key, found[image.key])
        return self._form([found[image.key] for image in images])

    def _keep(self, key: bytes, features: Features) -> None:
        size = sum(part.nbytes for part in features)
        if key in self._kept:
            self._kept.move_to_end(key)
        elif size <= self._max_bytes:
            while self.bytes + size > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.bytes -= sum(part.nbytes for part in oldest)
            # A copy: a view would hold the features of every image of its batch in memory.
            self._kept[key] = tuple(part.detach().clone() for part in features)
            self.bytes += size


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
    parts = {name: torch.cat([given[name][image.where[name]] for image in images]) for name in images[0].where}
    if "batch_num_images" in given:
        tiled = sum(image.tiled for image in images)
        # As one prompt with several images; one too many is announced where there is a single one.
        whole = [max(2, len(images) - tiled)] if tiled < len(images) else []
        parts["batch_num_images"] = torch.tensor([1] * tiled + whole)
    return {**given, **parts}


def _pixels(inputs: Mapping[str, Tensor], where: Mapping[str, tuple[slice, ...]]) -> Pixels:
    return Pixels(key=_digest(*(inputs[name][place] for name, place in where.items())), where=where)


def _rows(inputs: Mapping[str, Tensor]) -> list[Pixels]:
    """One image after the other: (images, C, H, W)."""
    names = [name for name in ("pixel_values", "image_sizes") if name in inputs]
    return [_pixels(inputs, dict.fromkeys(names, (slice(row, row + 1),))) for row in range(len(inputs["pixel_values"]))]


def _nested(inputs: Mapping[str, Tensor]) -> list[Pixels]:
    """Lists of images, padded to the longest with zeros, by which the model knows them: (B, most images, C, H, W)."""
    names = [name for name in ("pixel_values", "pixel_attention_mask") if name in inputs]
    real = inputs["pixel_values"].flatten(2).any(-1).nonzero()
    places = [tuple(slice(at, at + 1) for at in indices) for indices in real.tolist()]
    return [_pixels(inputs, dict.fromkeys(names, place)) for place in places]


def _tiles(inputs: Mapping[str, Tensor]) -> list[Pixels]:
    """Tiles of each image, padded with zeros to the largest number: (images, most tiles, C, H, W)."""
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    if pixels.dim() != 5:
        return []
    images, counts = [], inputs.get("batch_num_images", torch.ones(len(pixels), dtype=torch.long)).tolist()
    for row, tiled in enumerate(count == 1 for count in counts for _ in range(count)):
        # The image's size decides the number of tiles, so zeros at the end add nothing, padding or content.
        count = max([1, *(pixels[row].flatten(1).any(-1).nonzero().flatten() + 1).tolist()]) if tiled else 1
        key = _digest(pixels[row, :count], sizes[row], torch.tensor(tiled))
        where = dict.fromkeys(("pixel_values", "image_sizes"), (slice(row, row + 1),))
        images.append(Pixels(key=key, where=where, tiled=tiled))
    return images


def _grid(inputs: Mapping[str, Tensor]) -> list[Pixels]:
    """Patches of all images in a row: (patches, values of a patch); the grid has the number for each image."""
    ends = inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()
    spans = zip([0, *ends], ends, strict=False)
    return [
        _pixels(inputs, {"pixel_values": (slice(*span),), "image_grid_thw": (slice(row, row + 1),)})
        for row, span in enumerate(spans)
    ]


Layout = Callable[[Mapping[str, Tensor]], list[Pixels]]
LAYOUTS: dict[str, Layout] = {"rows": _rows, "tiles": _tiles, "grid": _grid, "nested": _nested}
"""From `Family.pixels` to a function that finds the images of a batch, in the order of their visual tokens."""


def _digest(*parts: Tensor) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
