"""The kinds of learned parts, a line each."""

from __future__ import annotations

from shortv.families.parts.base import Parts
from shortv.families.parts.dyvte import ExitRouters
from shortv.families.parts.eas import Eas
from shortv.families.parts.saisa import Projectors
from shortv.plan import PartsKind

PARTS: dict[PartsKind, type[Parts]] = {
    PartsKind.DYVTE: ExitRouters,
    PartsKind.EAS: Eas,
    PartsKind.SAISA: Projectors,
}
"""Which module each kind is."""
