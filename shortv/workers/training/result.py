"""The result of a training: learned parts and the plans that name them, from a worker or a published checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs as pafs

from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.families import LoadedModel
from shortv.learned.base import Parts
from shortv.learned.files import save_parts
from shortv.learned.registry import SYSTEMS
from shortv.learned.saisa.parts import read_published
from shortv.learned.saisa.recipe import LanguageModel
from shortv.learned.system import PlanSpec
from shortv.plan import LearnedParts, PartsKind, Plan
from shortv.spec import ModelSpec
from shortv.workers.models import ModelLoader
from shortv.workers.run import check_output

PARTS = "parts"
PLANS = "plans"
_CHUNK = 16 * 2**20


def write_result(
    place: Path,
    loaded: LoadedModel,
    parts: Parts,
    plans: Sequence[PlanSpec],
    *,
    model: str,
    training: Mapping[str, Any],
    source: Mapping[str, Any],
    dtype: str,
) -> None:
    """Write `parts/` and `plans/` below a local folder.

    Args:
        model: the name that header and plans give the base model.
        training: what the header says about how the parts were trained.
        source: what the plans say about it.
        dtype: what the weights are saved in.
    """
    architecture = loaded.architecture
    header = save_parts(
        place / PARTS,
        parts,
        model=model,
        revision=loaded.revision,
        config_digest=architecture.config_digest,
        training=training,
        dtype=getattr(torch, dtype),
    )
    (place / PLANS).mkdir()
    for each in plans:
        plan = Plan(
            name=each.name,
            model=model,
            revision=loaded.revision,
            config_digest=architecture.config_digest,
            num_layers=architecture.num_layers,
            modes=each.modes,
            source={**source, **parts.costs(architecture)},
            parts=LearnedParts(kind=parts.kind, path=f"../{PARTS}", digest=header.digest, threshold=each.threshold),
        )
        (place / PLANS / f"{each.name}.json").write_text(plan.to_json())


def publish_result(folder: Folder, filesystem: pafs.FileSystem, path: str) -> list[str]:
    """Copy a result into a run folder in chunks, and return the files' names in it.

    The weights come first, then their header, then the plans that name them.

    Raises:
        ShortVError: a file cannot be read or written.
    """
    names = []
    try:
        for info in filesystem.get_file_info(pafs.FileSelector(path, recursive=True)):
            if info.type == pafs.FileType.File:
                names.append(info.path.removeprefix(f"{path}/"))
        names.sort(key=lambda name: (name.startswith(PLANS), name.endswith(".json"), name))
        for name in names:
            with filesystem.open_input_stream(f"{path}/{name}") as stream:
                folder.write_bytes(name, iter(partial(stream.read, _CHUNK), b""))
    except OSError as error:
        raise ShortVError(f"the result of the training cannot be copied from {path}: {error}") from error
    return names


def convert_published(
    checkpoint: str,
    spec: ModelSpec,
    output_path: str,
    *,
    language_model: LanguageModel = "all",
    parts_dtype: str = "bfloat16",
    loader: ModelLoader | None = None,
) -> str:
    """Write the parts and the plan of a published SAISA checkpoint, and return where the plan is.

    Nothing is trained, and Ray is not needed. The base model is loaded on the CPU, which takes memory for the model
    and, in float32, for what the checkpoint replaces of it.

    Raises:
        Refused: the folder is not empty, the model cannot have such parts, or the checkpoint does not fit it.
        ShortVError: the model cannot be loaded, or the folder cannot be written.
    """
    check_output(output_path)
    folder = Folder(output_path)
    there = folder.list()
    if there:
        raise Refused(f"{folder.shown} holds {len(there)} files ({there[0]}); choose a new or empty --output-path")
    if not Path(checkpoint).exists():
        raise Refused(f"{checkpoint} does not exist; give the folder that the checkpoint was downloaded to")
    loader = loader or ModelLoader()
    loader.describe(spec)
    folder.check_writable()
    loaded = loader.load(spec, device="cpu", threads=0)
    parts = read_published(checkpoint, loaded.decoder, language_model=language_model)
    origin = {"checkpoint": Path(checkpoint).resolve().name, "language_model": language_model}
    with tempfile.TemporaryDirectory(prefix="shortv-parts-") as place:
        write_result(
            Path(place),
            loaded,
            parts,
            SYSTEMS[PartsKind.SAISA].plans(parts.settings, loaded.architecture.num_layers, ()),
            model=spec.name,
            training=origin,
            source=origin,
            dtype=parts_dtype,
        )
        names = publish_result(folder, pafs.LocalFileSystem(), place)
    return f"{folder.shown}/{names[-1]}"
