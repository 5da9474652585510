"""One calibration or benchmark question with its images."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

# The columns of a calibration file; a trailing "?" marks a column that may be missing or null.
CALIBRATION_COLUMNS: Mapping[str, str] = {
    "sample_id": "string",
    "images": "list<binary>",
    "prompt": "string",
    "answer": "string?",
    "dataset": "string?",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and its encoded images, drawn together.

    `images` are whole image files (PNG, JPEG, ...), not pixels. `<image>` markers in `prompt` place
    them; without markers they come first. A prompt without images is a valid sample.
    """

    sample_id: str
    images: tuple[bytes, ...] = ()
    prompt: str
    answer: str | None = None
    dataset: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of everything the sample holds."""
        images = [hashlib.sha256(image).hexdigest() for image in self.images]
        content = [self.sample_id, images, self.prompt, self.answer, self.dataset]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
