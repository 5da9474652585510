"""The lmms-eval tasks `shapes_vqa` and `shapes_new`."""

from pathlib import Path

import pytest

import shortv.tiny
from shortv.tiny.questions import KINDS

FOLDER = Path(shortv.tiny.__file__).parent / "task"
NAMES = ["shapes_new", "shapes_vqa"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    from lmms_eval.tasks import TaskManager, get_task_dict

    with pytest.MonkeyPatch.context() as patch:
        # Another working directory: the benchmark is found next to the task, not next to the caller.
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
        assert sorted(manager.all_tasks) == NAMES
        return get_task_dict(NAMES, manager, task_type="chat")


@pytest.fixture(params=["shapes_new", "shapes_vqa"])
def task(tasks, request):
    return tasks[request.param]


def test_documents_become_one_user_message(task):
    document = task.test_docs()[0]
    [message] = task.doc_to_messages(document)
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][0]["url"].size == (60, 60)
    assert message["content"][1]["text"] == task.doc_to_text(document) == document["prompt"]
    assert task.doc_to_visual(document)[0].size == (60, 60)
    assert task.doc_to_target(document) == document["answer"]


def test_answers_score_overall_and_under_their_kind(task):
    documents = list(task.test_docs())
    assert len(documents) == {"shapes_vqa": 1000, "shapes_new": 460}[task.config.task]
    reported = set(task.aggregation())
    scored = set()
    for document in documents[: 2 * len(KINDS)]:
        right = task.process_results(document, [f" {document['answer'].upper()}."])
        wrong = task.process_results(document, ["a zebra"])
        assert len(right) == 2
        assert set(right.values()) == {1.0} and set(wrong.values()) == {0.0}
        scored |= set(right)
    assert scored == reported
    assert task.aggregation()["exact_match"]([1.0, 0.0]) == 0.5
