"""A published SAISA checkpoint becomes learned parts and a plan; nothing is trained, and Ray is not needed."""

from __future__ import annotations

from pathlib import Path

from reports.store import Folder
from shortv.errors import Refused
from shortv.learned.registry import SYSTEMS
from shortv.learned.saisa.parts import read_published
from shortv.learned.saisa.recipe import LanguageModel
from shortv.plan import PartsKind
from shortv.spec import ModelSpec
from shortv.workers.models import ModelLoader
from shortv.workers.run import check_output
from shortv.workers.training.result import PLANS, result_files


def convert_published(
    checkpoint: str,
    spec: ModelSpec,
    output_path: str,
    *,
    language_model: LanguageModel = "all",
    parts_dtype: str = "bfloat16",
    engine: ModelLoader | None = None,
) -> str:
    """Write the parts and the plan of a checkpoint in the released layout, and return where the plan is.

    The base model is loaded on the CPU. It needs memory for the model and for what is replaced of it in float32.

    Raises:
        Refused: the folder holds something, the model cannot have such parts, or the checkpoint does not fit it.
        ShortVError: the model cannot be loaded, or the folder cannot be written.
    """
    check_output(output_path)
    folder = Folder(output_path)
    there = folder.list()
    if there:
        raise Refused(f"{folder.shown} holds {len(there)} files ({there[0]}); choose a new or empty --output-path")
    if not Path(checkpoint).exists():
        raise Refused(f"{checkpoint} does not exist; give the folder that the checkpoint was downloaded to")
    engine = engine or ModelLoader()
    engine.describe(spec)
    folder.check_writable()
    loaded = engine.load(spec, device="cpu", threads=0)
    parts = read_published(checkpoint, loaded.decoder, language_model=language_model)
    origin = {"checkpoint": Path(checkpoint).resolve().name, "language_model": language_model}
    files = result_files(
        loaded,
        parts,
        SYSTEMS[PartsKind.SAISA].plans(parts.settings, loaded.architecture.num_layers, ()),
        model=spec.name,
        training=origin,
        source=origin,
        dtype=parts_dtype,
    )
    for name, content in files.items():
        folder.write_bytes(name, content)
    (plan,) = (name for name in files if name.startswith(f"{PLANS}/"))
    return f"{folder.shown}/{plan}"
