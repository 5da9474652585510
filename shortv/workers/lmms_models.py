"""What lmms-eval finds in this package under its entry point group `lmms_eval.models`."""

from typing import Any


def manifest() -> Any:
    """Name the classes of the model `shortv`: for chat tasks, and for `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="shortv",
        chat_class_path="shortv.evals.local.ShortV",
        simple_class_path="shortv.evals.local.SimpleShortV",
    )


def served_manifest() -> Any:
    """Name the classes of the model `shortv_serve`, in the same way."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="shortv_serve",
        chat_class_path="shortv.workers.lmms_served.ShortVServe",
        simple_class_path="shortv.workers.lmms_served.SimpleShortVServe",
    )
