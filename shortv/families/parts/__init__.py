"""The modules of learned systems and their files; how they run is a matter of `shortv.layers`."""

from shortv.families.parts.base import Learned, Parts
from shortv.families.parts.files import load_parts, read_header, save_parts

__all__ = ["Learned", "Parts", "load_parts", "read_header", "save_parts"]
