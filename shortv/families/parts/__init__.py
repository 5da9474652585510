"""The modules of learned systems and their files; how they run is a matter of `shortv.layers`."""

from shortv.families.parts.base import Learned, Parts
from shortv.families.parts.files import load_parts, read_header, save_parts
from shortv.families.parts.held import held_parts

__all__ = ["Learned", "Parts", "held_parts", "load_parts", "read_header", "save_parts"]
