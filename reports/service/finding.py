"""Where runs are below the root, and what stands in the place of one."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from reports.manifest import MANIFEST_NAME
from reports.service.files import why
from reports.service.trees import Entry, Kind, Missing, Names, Tree, is_addressable

DEEPEST: Final = 3
"""How many folders lie between the root and a run at most, the run's own included."""
MOST_FOLDERS: Final = 5_000
"""How many folders are looked at."""
_LINK: Final = "it is a symbolic link, which is not followed"


class Found(NamedTuple):
    """A folder: a run with its entries, or the reason why it is none."""

    names: Names
    entries: Sequence[Entry] = ()
    reason: str | None = None


class Search(NamedTuple):
    """All that was found; `complete` is False where there was too much to look at."""

    found: list[Found]
    complete: bool


def find_runs(tree: Tree) -> Search:
    """Look for runs up to `DEEPEST` folders below the root. Raises OSError when the root cannot be listed."""
    walk = _Walk(tree)
    return Search(list(walk.below((), tree.entries(()))), walk.left > 0)


class _Walk:
    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.left = MOST_FOLDERS

    def below(self, folder: Names, entries: Sequence[Entry]) -> Iterator[Found]:
        """Yield what the folders among the entries are."""
        for entry in entries:
            names = (*folder, entry.name)
            if entry.name.startswith(".") or entry.kind in (Kind.FILE, Kind.OTHER) or self.left <= 0:
                continue
            if entry.kind is Kind.LINK:
                yield Found(names, reason=_LINK)
            elif not is_addressable(entry.name):
                yield Found(names, reason="its name has characters that no address can have; rename it")
            else:
                yield from self._folder(names)

    def _folder(self, names: Names) -> Iterator[Found]:
        self.left -= 1
        try:
            entries = self._tree.entries(names)
        except Missing:  # gone since the folder above was read
            return
        except OSError as error:
            yield Found(names, reason=f"it cannot be listed: {why(error)}")
            return
        kind = next((entry.kind for entry in entries if entry.name == MANIFEST_NAME), None)
        if kind is not None:
            reason = None if kind is Kind.FILE else f"its {MANIFEST_NAME} is a {kind}, which is not read"
            yield Found(names, entries, reason)
            return
        inner = list(self.below(names, entries)) if len(names) < DEEPEST else []
        if any(found.entries for found in inner):
            yield from inner
        else:
            yield Found(names, reason=f"it is no run: it holds no {MANIFEST_NAME}")


class Asked(NamedTuple):
    """A path below the root as a run and what is asked of it."""

    run: Names
    rest: Names


def split(tree: Tree, names: Names) -> Asked:
    """Find the run in a path: the first of its folders that holds a manifest. Raises Missing or OSError."""
    for depth in range(1, min(DEEPEST, len(names)) + 1):
        try:
            tree.open((*names[:depth], MANIFEST_NAME)).close()
        except Missing:
            continue
        return Asked(names[:depth], names[depth:])
    raise Missing
