"""Models on workers: checked and pinned to a commit by the driver, loaded by each worker in one way.

The driver makes a `RemoteModel` with `remote_model`; it travels to workers as an argument and holds no model.
A worker calls `load` or `load_preprocessor`. A folder of the driver's node is shipped to nodes that do not have it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shortv.architecture import Architecture
from shortv.errors import ShortVError, one_line
from shortv.spec import ModelSpec
from shortv.workers.shipping import ShippedFolder, offer

_HUB = ("HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH")
_CONFIG = {"name", "revision", "trust_remote_code"}
_PROCESSOR = {*_CONFIG, "chat_template"}


class Environment(dict[str, str]):
    """Environment variables for workers that never show their values."""

    def __repr__(self) -> str:
        return f"Environment({', '.join(self)})"

    __str__ = __repr__


def hub_environment() -> Environment:
    """Return what this process knows of the hub, for workers on other nodes."""
    return Environment({name: os.environ[name] for name in _HUB if name in os.environ})


class ModelLoader:
    """Loads models through `shortv.families`. Tests override its methods."""

    def pin(self, spec: ModelSpec) -> ModelSpec:
        """Return the model at the commit that its revision names now, for all workers and attempts. Raises Refused."""
        from shortv.families import commit_of

        return spec.model_copy(update={"revision": commit_of(**spec.model_dump(include=_CONFIG))})

    def describe(self, spec: ModelSpec) -> Architecture:
        """Read the configuration and the processor, not the weights. Raises Refused."""
        from shortv.families import load_architecture

        self.load_preprocessor(spec)
        return load_architecture(**spec.model_dump(include=_CONFIG))

    def load(self, spec: ModelSpec, *, device: str, threads: int) -> Any:
        """Load weights and processor. Raises ShortVError.

        Args:
            device: a torch device, or "auto-map" to spread the layers over all visible GPUs.
            threads: CPU threads to compute with; 0 keeps torch's number.
        """
        import torch

        from shortv.families import load

        if threads:
            torch.set_num_threads(threads)
        return load(**spec.model_dump(), device=device)

    def load_preprocessor(self, spec: ModelSpec) -> Any:
        """Load what prepares inputs, without the weights. Raises ShortVError."""
        from shortv.families import load_preprocessor

        return load_preprocessor(**spec.model_dump(include=_PROCESSOR))


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """A model as the driver sends it to workers."""

    loader: ModelLoader
    spec: ModelSpec
    folder: ShippedFolder | None
    environment: Environment = field(default_factory=Environment)

    def load(self, *, device: str, threads: int) -> Any:
        """Load the model in this process. Raises ShortVError, one line, whatever the model's library raises."""
        return self._guarded(lambda spec: self.loader.load(spec, device=device, threads=threads))

    def load_preprocessor(self) -> Any:
        """Load what prepares inputs in this process. Raises ShortVError."""
        return self._guarded(self.loader.load_preprocessor)

    def _guarded(self, load: Callable[[ModelSpec], Any]) -> Any:
        os.environ.update(self.environment)
        try:
            name = str(self.folder.local()) if self.folder else self.spec.name
            return load(self.spec.model_copy(update={"name": name}))
        except ShortVError:
            raise
        except Exception as error:  # loading runs code of the model's library
            message = f"{type(error).__name__}: {one_line(error)}"
            raise ShortVError(f"{self.spec.name!r} cannot be loaded: {message}") from error


def remote_model(loader: ModelLoader, spec: ModelSpec) -> RemoteModel:
    """Return a model for the workers of the connected cluster."""
    return RemoteModel(loader=loader, spec=spec, folder=offer(spec.name), environment=hub_environment())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that fewer samples at a time may help."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
