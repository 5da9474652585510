"""The lmms-eval tasks `shapes_vqa` and `shapes_new`."""

import pytest

from shortv.tiny.questions import KINDS
from tests.tiny_model import TINY

DOCUMENTS = {"shapes_new": 460, "shapes_vqa": 1000}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    from lmms_eval.tasks import TaskManager, get_task_dict

    with pytest.MonkeyPatch.context() as patch:
        # Another working directory: the benchmark is found next to the task, not next to the caller.
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        manager = TaskManager(include_path=str(TINY / "task"), include_defaults=False)
        assert sorted(manager.all_tasks) == list(DOCUMENTS)
        return get_task_dict(list(DOCUMENTS), manager, task_type="chat")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_become_one_user_message_and_answers_score_under_their_kind(tasks, name):
    task = tasks[name]
    documents = list(task.test_docs())
    assert len(documents) == DOCUMENTS[name]
    [message] = task.doc_to_messages(documents[0])
    image, text = message["content"]
    assert (message["role"], image["type"], text["type"]) == ("user", "image", "text")
    assert image["url"].size == task.doc_to_visual(documents[0])[0].size == (60, 60)
    assert text["text"] == task.doc_to_text(documents[0]) == documents[0]["prompt"]
    scored = set()
    for document in documents[: 2 * len(KINDS)]:
        right = task.process_results(document, [f" {document['answer'].upper()}."])
        wrong = task.process_results(document, ["a zebra"])
        assert len(right) == 2 and set(right.values()) == {1.0} and set(wrong.values()) == {0.0}
        scored |= set(right)
    assert scored == set(task.aggregation())
