"""Scenes: coloured shapes on a three by three grid, drawn by seed and rendered to pixels."""

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 60
GRID = 3
CELL = IMAGE_SIZE // GRID
BACKGROUND = (240, 240, 240)

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 200, 30),
    "purple": (150, 60, 180),
    "black": (25, 25, 25),
}
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))
SPLITS = ("benchmark", "calibration", *("training",) * 14)

Coordinates = NDArray[np.float64]
Pixels = NDArray[np.uint8]

# Each shape says which offsets (x, y) from its centre belong to it, for a radius of r pixels; y grows downwards.
SHAPES: Mapping[str, Callable[[Coordinates, Coordinates, float], NDArray[np.bool_]]] = {
    "circle": lambda x, y, r: x * x + y * y <= r * r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= 0.85 * r,
    "triangle": lambda x, y, r: (abs(x) <= 0.55 * (y + r)) & (y <= 0.8 * r),
    "cross": lambda x, y, r: (np.minimum(abs(x), abs(y)) <= 0.3 * r) & (np.maximum(abs(x), abs(y)) <= r),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One shape in one cell of the grid; shift and radius are in pixels."""

    place: str
    colour: str
    shape: str
    shift: tuple[int, int]
    radius: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The objects of one image, in reading order."""

    objects: tuple[SceneObject, ...]

    @property
    def layout(self) -> str:
        """What questions can ask about: places, colours and shapes, without shifts and radii."""
        return ";".join(f"{thing.place},{thing.colour},{thing.shape}" for thing in self.objects)

    @property
    def split(self) -> str:
        """The split, one of SPLITS, that may use this layout."""
        return SPLITS[zlib.crc32(self.layout.encode()) % len(SPLITS)]


def draw_scene(rng: random.Random, split: str) -> Scene:
    """Draw a scene of two to five objects whose layout belongs to the split."""
    while True:
        # Few colours in most scenes: otherwise counts by colour above one would hardly ever occur.
        palette = rng.sample(sorted(COLOURS), rng.choice((2, 2, 3, 6)))
        cells = sorted(rng.sample(range(GRID * GRID), rng.randint(2, 5)))
        scene = Scene(
            objects=tuple(
                SceneObject(
                    place=PLACES[cell],
                    colour=rng.choice(palette),
                    shape=rng.choice(tuple(SHAPES)),
                    shift=(rng.randint(-2, 2), rng.randint(-2, 2)),
                    radius=rng.randint(6, 8),
                )
                for cell in cells
            )
        )
        if scene.split == split:
            return scene


def render(scene: Scene) -> Pixels:
    """Draw the scene's pixels, an array of height x width x RGB."""
    pixels = blank_image()
    offsets = np.arange(CELL) - (CELL - 1) / 2
    for thing in scene.objects:
        row, column = divmod(PLACES.index(thing.place), GRID)
        x, y = np.meshgrid(offsets - thing.shift[0], offsets - thing.shift[1])
        cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell[SHAPES[thing.shape](x, y, thing.radius)] = COLOURS[thing.colour]
    return pixels


def blank_image() -> Pixels:
    """Give the image of an empty scene: nothing but background."""
    return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, dtype=np.uint8)
