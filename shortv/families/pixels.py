"""The images of an encoded batch as the vision tower gets them, one by one, each with a digest of its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from shortv.families.table import Family

PIXEL_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "batch_num_images")
"""What processors return for the tower; all their other tensors have a value for each token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """One image as the tower gets it (one row of pixels where the processor cuts images into several)."""

    parts: Mapping[str, Tensor]
    """Its part of each tensor of the batch that has one for it."""
    tiled: bool = True
    """False where LLaVA-OneVision does not tile an image, because its prompt has several."""
    tiles: int | None = None
    """Its tiles, where the first dimensions of `pixel_values` are (1, most tiles of its batch)."""

    @cached_property
    def key(self) -> bytes:
        """A digest: images with the same one are the same input of the tower."""
        digest = hashlib.sha256(f"{self.tiled}".encode())
        for name, part in self.parts.items():
            whole = part[:, : self.tiles] if name == "pixel_values" and self.tiles else part
            digest.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
            digest.update(whole.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    @property
    def size(self) -> int:
        """Values of its pixels, by which the time of a run of the tower is shared out."""
        return self.parts["pixel_values"].numel()


def images_of(family: Family, inputs: Mapping[str, Tensor]) -> tuple[Pixels, ...]:
    """Return the images of a batch in CPU memory, in the order of their visual tokens.

    A layout that no processor of the family produces gives none.
    """
    return tuple(LAYOUTS[family.pixels](inputs)) if "pixel_values" in inputs else ()


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension, smaller ones padded with zeros at the end of the others."""
    shapes = [part.shape[1:] for part in parts]
    if len(set(shapes)) > 1:
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        missing = [[most - size for most, size in zip(largest, shape, strict=True)] for shape in shapes]
        # `pad` takes the last dimension first, and for each how much goes before it.
        parts = [
            pad(part, [n for size in reversed(more) for n in (0, size)])
            for part, more in zip(parts, missing, strict=True)
        ]
    return torch.cat(list(parts))


def _rows(inputs: Mapping[str, Tensor]) -> list[Pixels]:
    """One image after the other: (images, C, H, W)."""
    names = [name for name in ("pixel_values", "image_sizes") if name in inputs]
    rows = range(len(inputs["pixel_values"]))
    return [Pixels(parts={name: inputs[name][row : row + 1] for name in names}) for row in rows]


def _nested(inputs: Mapping[str, Tensor]) -> list[Pixels]:
    """Lists of images, padded to the longest with zeros, by which the model knows them: (B, most images, C, H, W)."""
    names = [name for name in ("pixel_values", "pixel_attention_mask") if name in inputs]
    real = inputs["pixel_values"].flatten(2).any(-1).nonzero().tolist()
    return [
        Pixels(parts={name: inputs[name][row : row + 1, at : at + 1] for name in names})
        for row, at in real
    ]  # fmt: skip


def _tiles(inputs: Mapping[str, Tensor]) -> list[Pixels]:
    """Tiles of each image, padded with zeros to the largest number: (images, most tiles, C, H, W)."""
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    if pixels.dim() != 5:
        return []
    images, counts = [], inputs.get("batch_num_images", torch.ones(len(pixels), dtype=torch.long)).tolist()
    for row, tiled in enumerate(count == 1 for count in counts for _ in range(count)):
        # The image's size decides the number of tiles, so zeros at the end add nothing, padding or content.
        count = max([1, *(pixels[row].flatten(1).any(-1).nonzero().flatten() + 1).tolist()]) if tiled else 1
        parts = {"pixel_values": pixels[row : row + 1], "image_sizes": sizes[row : row + 1]}
        images.append(Pixels(parts=parts, tiled=tiled, tiles=count))
    return images


def _grid(inputs: Mapping[str, Tensor]) -> list[Pixels]:
    """Patches of all images in a row: (patches, values of a patch); the grid has the number for each image."""
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    patches = torch.split(pixels, grid.prod(-1).tolist())
    return [
        Pixels(parts={"pixel_values": own, "image_grid_thw": grid[row : row + 1]}) for row, own in enumerate(patches)
    ]


Layout = Callable[[Mapping[str, Tensor]], list[Pixels]]
LAYOUTS: Mapping[str, Layout] = {"rows": _rows, "tiles": _tiles, "grid": _grid, "nested": _nested}
"""From `Family.pixels` to a function that finds the images of a batch."""
