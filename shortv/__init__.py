"""Find the layers of a multimodal LLM that need not touch their visual tokens."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shortv.architecture import Architecture
    from shortv.errors import Refused, SampleError, ShortVError
    from shortv.learned.apply import apply
    from shortv.plan import Mode, Plan
    from shortv.sample import Sample

__all__ = ["Architecture", "Mode", "Plan", "Refused", "Sample", "SampleError", "ShortVError", "apply"]

# Where each public name lives; it is loaded on first use, so `import shortv` stays light.
_HOMES = {
    "Architecture": "shortv.architecture",
    "Mode": "shortv.plan",
    "Plan": "shortv.plan",
    "Refused": "shortv.errors",
    "Sample": "shortv.sample",
    "SampleError": "shortv.errors",
    "ShortVError": "shortv.errors",
    "apply": "shortv.learned.apply",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'shortv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
