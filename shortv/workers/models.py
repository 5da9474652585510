"""Models on workers: checked and pinned to a commit by the driver, loaded by each worker in one way.

The driver makes a `RemoteModel` with `remote_model`; it travels to workers as an argument and holds no model.
A worker calls `load` or `load_preprocessor`. A folder of the driver's node is shipped to nodes that do not have it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortv.architecture import Architecture
from shortv.errors import ShortVError, one_line
from shortv.spec import ModelSpec
from shortv.workers.shipping import ShippedFolder, folder_digest, offer

_HUB = ("HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH")


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
        """Return the same model at the commit that its revision names now, for all workers and attempts.

        Raises:
            Refused: no such model.
        """
        from shortv.families import commit_of

        commit = commit_of(spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        return spec.model_copy(update={"revision": commit})

    def describe(self, spec: ModelSpec) -> Architecture:
        """Read the configuration and the processor, not the weights. Raises Refused."""
        from shortv.families import load_architecture, load_preprocessor

        load_preprocessor(
            spec.name,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            chat_template=spec.chat_template,
        )
        return load_architecture(spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)

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
        return load(
            spec.name,
            revision=spec.revision,
            dtype=spec.dtype,
            device=device,
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
            chat_template=spec.chat_template,
        )

    def load_preprocessor(self, spec: ModelSpec) -> Any:
        """Load what prepares inputs, without the weights. Raises ShortVError."""
        from shortv.families import load_preprocessor

        return load_preprocessor(
            spec.name,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            chat_template=spec.chat_template,
        )


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

    def _guarded(self, load: Any) -> Any:
        os.environ.update(self.environment)
        try:
            folder = self.folder.local() if self.folder else None
            return load(self.spec.model_copy(update={"name": str(folder)}) if folder else self.spec)
        except ShortVError:
            raise
        except Exception as error:  # loading runs code of the model's library
            message = f"{type(error).__name__}: {one_line(error)}"
            raise ShortVError(f"{self.spec.name!r} cannot be loaded: {message}") from error


def model_folder(name: str) -> tuple[Path, str] | None:
    """Return the folder that a model is in and the digest of its files, or None for a hub id."""
    path = Path(name)
    if not path.is_dir():
        return None
    path = path.resolve()
    return path, folder_digest(path)


def remote_model(loader: ModelLoader, spec: ModelSpec) -> RemoteModel:
    """Return a model for the workers of the connected cluster."""
    found = model_folder(spec.name)
    return RemoteModel(loader=loader, spec=spec, folder=offer(*found) if found else None, environment=hub_environment())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that fewer samples at a time may help."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
