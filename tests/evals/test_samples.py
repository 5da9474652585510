"""lmms-eval tasks as calibration samples."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import EpsImagePlugin, Image
from pyarrow import parquet as pq

from shortv.errors import Refused, ShortVError
from shortv.evals.samples import TaskSpec, parse_spec, samples_of_tasks, task_samples

TINY_TASK = Path(__file__).parents[2] / "shortv/tiny/task"
N_DOCS = 30
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"

TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.doc_to_visual
doc_to_text: "What is shade {{{{shade}}}}?"
doc_to_target: answer
process_results: !function functions.process_results
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""

FUNCTIONS = """
import io
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]

def process_results(doc, results):
    return {"exact_match": 1.0}
"""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # lmms-eval tries to load data five times, two seconds apart.
    from lmms_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask.download.retry, "sleep", lambda seconds: None)
    yield


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of three tasks: whose images show what their questions say, one damaged, one without data."""
    pictures = [png(shade) for shade in range(N_DOCS)]
    for name, images in {"shades": pictures, "damaged": [b"not an image", EPS, *pictures[2:]]}.items():
        data = tmp_path / f"{name}.parquet"
        table = pa.table(
            {
                "shade": list(range(N_DOCS)),
                "answer": [str(shade) for shade in range(N_DOCS)],
                "picture": images,
                "question_id": [f"q{shade}" for shade in range(N_DOCS)],
            }
        )
        pq.write_table(table, data)
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (tmp_path / "absent.yaml").write_text(TASK.format(name="absent", data=tmp_path / "absent.parquet"))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path


def test_question_image_and_answer_stay_together(tasks: Path) -> None:
    samples = task_samples("shades:20", seed=3, include_path=tasks)
    assert len(samples) == 20
    for sample in samples:
        shade = re.fullmatch(r"What is shade (\d+)\?", sample.prompt)
        assert shade is not None
        (image,) = sample.images
        assert Image.open(io.BytesIO(image)).getpixel((0, 0)) == (int(shade[1]),) * 3
        assert sample.answer == shade[1]
        assert (sample.sample_id, sample.dataset) == (f"shades/q{shade[1]}", "shades")


def test_the_draw_is_fixed_by_the_seed(tasks: Path) -> None:
    first = task_samples("shades:5", seed=0, include_path=tasks)
    assert task_samples("shades:5", seed=0, include_path=[str(tasks)]) == first
    assert task_samples("shades:5", seed=1, include_path=tasks) != first
    more = {sample.sample_id for sample in task_samples("shades:6", seed=0, include_path=tasks)}
    assert {sample.sample_id for sample in first} < more


def test_a_damaged_document_is_kept_for_its_error_row_and_starts_no_program(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    samples = samples_of_tasks([f"damaged:{N_DOCS}", "shades:1"], seed=0, include_path=tasks)
    assert len(samples) == N_DOCS + 1
    assert [sample.sample_id for sample in samples if sample.images == (b"",)] == ["damaged/q0", "damaged/q1"]
    assert not (tmp_path / "started").exists() and EpsImagePlugin.gs_binary is None


def test_what_cannot_be_drawn_is_said_in_one_line(tasks: Path) -> None:
    cases = {
        "shade:3": (Refused, r"has no task 'shade'; did you mean shades"),
        f"shades:{N_DOCS + 1}": (Refused, "has 30 documents, fewer than 31"),
        "absent:1": (ShortVError, "'absent' could not be loaded: FileNotFoundError"),
        # A task of lmms-eval itself, whose data is on a hub that tests cannot reach.
        "gqa:2": (ShortVError, "'gqa' could not be loaded: .*check that its data set"),
        "mmmu:2": (Refused, "'mmmu' is the name of a group of tasks"),
    }
    for spec, (kind, message) in cases.items():
        with pytest.raises(kind, match=message) as caught:
            task_samples(spec, seed=0, include_path=tasks)
        assert "\n" not in str(caught.value)
    with pytest.raises(Refused, match="does not exist"):
        task_samples("shades:1", seed=0, include_path=tasks / "nowhere")
    with pytest.raises(Refused, match="named twice"):
        samples_of_tasks(["shades:1", "shades:2"], seed=0, include_path=tasks)


def test_the_bundled_task_gives_samples() -> None:
    samples = task_samples("shapes_vqa:4", seed=0, include_path=TINY_TASK)
    assert len({sample.sample_id for sample in samples}) == 4
    for sample in samples:
        assert sample.prompt and sample.answer and Image.open(io.BytesIO(sample.images[0])).size[0] > 0


def test_drawing_prints_nothing(tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task_samples("shades:2", seed=0, include_path=tasks)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_specs_name_a_task_and_a_number() -> None:
    assert parse_spec("flickr30k_test:20") == TaskSpec("flickr30k_test", 20)
    for text in ("gqa", "gqa:", "gqa:0", "gqa:-1", "gqa:0.5", ":3", "gqa:2:3"):
        with pytest.raises(Refused, match="TASK:NUMBER"):
            parse_spec(text)
