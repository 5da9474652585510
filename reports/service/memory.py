"""What was found out about a file, kept for as long as the file stays the same."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

V = TypeVar("V")
_MOST: Final = 4096
# A store's clock may tick once a second: two contents of one second look like one.
_SETTLED_S: Final = 2.0


class Memory(Generic[V]):
    """Values by key, the most recently used ones; each is computed by one thread while others wait for it."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, V] = OrderedDict()
        self._gates: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def recall(self, key: Hashable, make: Callable[[], V], *, modified: float | None) -> V:
        """Return the value of a key, which names a file and its version; `modified` is the file's time."""
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
                if modified is None or abs(time.time() - modified) > _SETTLED_S:
                    self._keep(key, value)
            finally:
                with self._lock:
                    self._gates.pop(key, None)
        return value

    def _keep(self, key: Hashable, value: V) -> None:
        with self._lock:
            self._known[key] = value
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
