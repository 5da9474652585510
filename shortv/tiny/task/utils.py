"""Functions of the lmms-eval tasks `shapes_vqa` and `shapes_new`, named by their YAML files."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from shortv.tiny.questions import exact_match


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Give the document's images."""
    return [Image.open(io.BytesIO(image)).convert("RGB") for image in doc["images"]]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Give the question, between the model's own texts where it has some."""
    own = lmms_eval_specific_kwargs or {}
    return f"{own.get('pre_prompt', '')}{doc['prompt']}{own.get('post_prompt', '')}"


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Give the document as one user message: its images, then the question."""
    images = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)}]}
    ]


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Score one answer: once overall and once under its kind of question."""
    score = float(exact_match(results[0], doc["answer"]))
    return {"exact_match": score, f"exact_match_{doc['kind'].replace('-', '_')}": score}
