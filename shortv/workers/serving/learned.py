"""The learned parts of a replica's plans: one copy of each, whatever the number of plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

from shortv.families import LoadedModel
from shortv.families.parts import Learned, Parts, load_parts
from shortv.layers.learned import run_of
from shortv.plan import LearnedParts, PartsKind, Plan
from shortv.workers.shipping import ShippedFolder


class PartsShelf:
    """Loads parts for one model, and holds them for as long as a plan or a row that runs needs them."""

    def __init__(self, loaded: LoadedModel, folders: Mapping[str, ShippedFolder]) -> None:
        """Take the model, and by their path those folders of parts that other nodes may lack."""
        self._loaded = loaded
        self._folders = folders
        self._held: WeakValueDictionary[tuple[PartsKind, str, str], Parts] = WeakValueDictionary()

    def learned(self, plan: Plan) -> Learned | None:
        """What a plan needs beside its modes. Raises Refused where it cannot be loaded, or not run under them."""
        named = plan.parts
        if named is None:
            return None
        learned = Learned(parts=self._parts(named), threshold=named.threshold)
        run_of(self._loaded.decoder, plan.modes, learned)
        return learned

    def _parts(self, named: LearnedParts) -> Parts:
        key = (named.kind, named.path, named.digest)
        found = self._held.get(key)
        if found is None:
            folder = self._folders.get(named.path)
            here = replace(named, path=str(folder.local())) if folder else named
            found = self._held[key] = load_parts(here, self._loaded.decoder, self._loaded.architecture)
        return found


def parts_of(plans: Iterable[Plan]) -> list[str]:
    """The folders of parts that plans name, each once."""
    return list(dict.fromkeys(plan.parts.path for plan in plans if plan.parts is not None))
