"""What was found out about a file or a run, kept for as long as it stays the same."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

V = TypeVar("V")
# A store's clock may tick once a second: two contents of one second look like one.
_SETTLED_S: Final = 2.0


class Memory(Generic[V]):
    """Values by key, the `most` recently used ones; each is computed by one thread while others wait for it.

    More keys than `most` in the same order again and again find nothing: `most` must exceed what one list asks for.
    """

    def __init__(self, most: int) -> None:
        """Start with nothing."""
        self._most = most
        self._known: OrderedDict[Hashable, V] = OrderedDict()
        self._gates: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def recall(
        self, key: Hashable, make: Callable[[], V], *, modified: float | None, lasts: Callable[[], bool] = lambda: True
    ) -> V:
        """Return the value of a key, which names a file and its version; `modified` is the file's time.

        `lasts` says of a value just made whether the next one would be the same.
        """
        with self._lock:
            gate = self._gates.setdefault(key, threading.Lock())
        with gate:
            with self._lock:
                if key in self._known:
                    self._known.move_to_end(key)
                    self._gates.pop(key, None)
                    return self._known[key]
            try:
                value = make()
                if lasts() and (modified is None or abs(time.time() - modified) > _SETTLED_S):
                    self.keep(key, value)
            finally:
                with self._lock:
                    self._gates.pop(key, None)
        return value

    def keep(self, key: Hashable, value: V) -> None:
        """Remember a value, whatever was known of its key."""
        with self._lock:
            self._known[key] = value
            self._known.move_to_end(key)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
