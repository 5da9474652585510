"""lmms-eval tasks as calibration samples."""

import io
import re
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import EpsImagePlugin, Image
from pyarrow import parquet as pq

from shortv.errors import Refused, ShortVError
from shortv.evals.tasks import task_samples

N_DOCS = 30
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {name}.parquet}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.doc_to_visual
doc_to_text: "What is shade {{{{shade}}}}?"
doc_to_target: answer
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
import io
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]
"""


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks: whose images show what their questions say, two damaged, one without data."""
    folder = tmp_path_factory.mktemp("tasks")
    pictures = [png(shade) for shade in range(N_DOCS)]
    shades = [str(shade) for shade in range(N_DOCS)]
    columns = {"shade": shades, "answer": shades, "question_id": [f"q{shade}" for shade in shades]}
    for name, images in {"shades": pictures, "damaged": [b"not an image", EPS, *pictures[2:]], "absent": None}.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name))
        if images:
            pq.write_table(pa.table({**columns, "picture": images}), folder / f"{name}.parquet")
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


def test_question_image_and_answer_stay_together(tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    samples = task_samples("shades:20", seed=3, include_path=tasks)
    assert len(samples) == 20
    for sample in samples:
        shade = re.fullmatch(r"What is shade (\d+)\?", sample.prompt)
        assert shade is not None
        (image,) = sample.images
        assert Image.open(io.BytesIO(image)).getpixel((0, 0)) == (int(shade[1]),) * 3
        assert (sample.answer, sample.sample_id, sample.dataset) == (shade[1], f"shades/q{shade[1]}", "shades")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_the_draw_is_fixed_by_the_seed(tasks: Path) -> None:
    first = task_samples("shades:5", seed=0, include_path=tasks)
    assert task_samples("shades:5", seed=0, include_path=[str(tasks)]) == first
    assert task_samples("shades:5", seed=1, include_path=tasks) != first
    more = {sample.sample_id for sample in task_samples("shades:6", seed=0, include_path=tasks)}
    assert {sample.sample_id for sample in first} < more


def test_a_damaged_document_is_kept_for_its_error_row_and_starts_no_program(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    samples = task_samples(f"damaged:{N_DOCS}", seed=0, include_path=tasks)
    assert len(samples) == N_DOCS
    assert [sample.sample_id for sample in samples if sample.images == (b"",)] == ["damaged/q0", "damaged/q1"]
    assert not (tmp_path / "started").exists() and EpsImagePlugin.gs_binary is None


def test_what_cannot_be_drawn_is_said_in_one_line(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.api.task import ConfigurableTask

    # lmms-eval tries to load data five times, two seconds apart.
    monkeypatch.setattr(ConfigurableTask.download.retry, "sleep", lambda seconds: None)
    cases = {
        f"shades:{N_DOCS + 1}": (Refused, "has 30 documents, fewer than 31"),
        "absent:1": (ShortVError, "'absent' could not be loaded: .*FileNotFoundError.*check that its data set"),
        **{text: (Refused, "TASK:NUMBER") for text in ("gqa", "gqa:", "gqa:0", "gqa:-1", "gqa:0.5", ":3", "gqa:2:3")},
    }
    for spec, (kind, message) in cases.items():
        with pytest.raises(kind, match=message) as caught:
            task_samples(spec, seed=0, include_path=tasks)
        assert "\n" not in str(caught.value)
    with pytest.raises(Refused, match="does not exist"):
        task_samples("shades:1", seed=0, include_path=tasks / "nowhere")
