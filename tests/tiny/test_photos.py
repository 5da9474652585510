"""The generated task of photographs."""

import io

import pyarrow.parquet as pq
import pytest
from PIL import Image

from shortv.evals.tasks import find_task
from shortv.tiny.photos import LARGE, SMALL, make_photos_vqa


def files(folder):
    table = pq.read_table(folder / "photos_vqa.parquet", columns=["image"])
    return [image["bytes"] for image in table["image"].to_pylist()]


@pytest.mark.parametrize(("size", "kilobytes"), [(SMALL, (30, 70)), (LARGE, (130, 300))])
def test_photos_are_jpeg_files_as_large_as_photographs_and_follow_the_seed(tmp_path, size, kilobytes):
    first, again, other = (
        files(make_photos_vqa(tmp_path / name, n=3, size=size, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again and not set(first) & set(other)
    for file in first:
        image = Image.open(io.BytesIO(file))
        assert (image.format, image.size) == ("JPEG", size)
        assert kilobytes[0] < len(file) / 1000 < kilobytes[1]


def test_the_task_gives_photos_and_scores_answers(tmp_path):
    make_photos_vqa(tmp_path, n=7)
    task = find_task("photos_vqa", tmp_path)("chat")
    documents = list(task.test_docs())
    assert len({document["kind"] for document in documents}) == 6
    for document in documents:
        [message] = task.doc_to_messages(document)
        image, text = message["content"]
        assert image["url"].size == task.doc_to_visual(document)[0].size == SMALL
        assert text["text"] == task.doc_to_text(document) == document["prompt"]
        assert task.process_results(document, [document["answer"]])["exact_match"] == 1.0
        assert task.process_results(document, ["a zebra"])["exact_match"] == 0.0
