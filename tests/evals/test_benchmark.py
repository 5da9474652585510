"""Benchmarks whose requests go to replicas."""

import asyncio
import io
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lmms_eval.api.instance import Instance
from PIL import Image
from pyarrow import parquet as pq

from shortv.errors import Refused, ShortVError
from shortv.evals.benchmark import Benchmark
from shortv.evals.dispatch import Response, respond_under_plans, send_all
from shortv.evals.requests import Conversation, GenerationSettings
from shortv.evals.scoring import _loaded, _storable
from shortv.request import Completion, Failure, Reason, Request
from shortv.tiny.questions import KINDS
from tests.evals.lmms_tasks import (
    N_DOCS,
    TINY_TASK,
    FakeClient,
    FakeModel,
    Scored,
    SimpleFakeModel,
    WorkClient,
    lost,
    respond,
    scored,
    simple_evaluation,
    write_tasks,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def run(benchmark: Benchmark, client: FakeClient | None = None, **more: Any) -> Scored:
    return scored(benchmark, respond(benchmark, client or FakeClient()), **more)


def as_lmms(scored: Scored) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in scored.metrics:
        found[f"{row.metric},{row.filter}"] = row.value
        for kind in ("stderr", "stderr_clt", "stderr_clustered"):
            value = getattr(row, kind)
            found[f"{row.metric}_{kind},{row.filter}"] = "N/A" if value is None else value
    return found


@pytest.mark.parametrize(
    ("task", "limit"), [("shapes_vqa", 40), ("filtered", None), ("plain", 23), ("rounds", None), ("choices", 20)]
)
def test_metrics_are_those_of_lmms_eval(
    task: str,
    limit: int | None,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import lmms_eval.evaluator as evaluator

    if task == "choices":
        # It turns pairs into text (0.7.3) and then fails on it.
        monkeypatch.setattr(evaluator, "unwrap_generation_output", lambda output: (output, None))
    benchmark = Benchmark(task, limit=limit, include_path=tasks)
    scored = run(benchmark)
    folder = TINY_TASK if task == "shapes_vqa" else tasks
    model = SimpleFakeModel() if task == "choices" else FakeModel()
    expected = simple_evaluation(model, task, folder, tmp_path, limit=limit)
    assert as_lmms(scored) == expected
    assert len(expected) >= 4 and 0 < scored.metrics[0].value < 4
    assert [sample.error for sample in scored.samples] == [None] * (limit or N_DOCS)
    assert all(row.n <= len(scored.samples) for row in scored.metrics)
    # A benchmark serves any number of plans, and leaves the process as it was.
    state, _ = random.getstate(), capfd.readouterr()
    again = run(benchmark)
    assert random.getstate() == state and again.metrics == scored.metrics
    assert [sample.scores for sample in again.samples] == [sample.scores for sample in scored.samples]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_a_document_without_an_answer_counts_in_no_metric(tasks: Path, tmp_path: Path) -> None:
    benchmark = Benchmark("filtered", include_path=tasks)
    whole = run(benchmark, folder=str(tmp_path))
    assert (tmp_path / "report.txt").read_text() == str(N_DOCS)
    failing = {"thing 3?": lost(), "thing 7?": "boom"}
    scored = run(benchmark, FakeClient(failing), folder=str(tmp_path))
    assert (tmp_path / "report.txt").read_text() == str(N_DOCS - 2)
    errors = {sample.sample_id: sample.error for sample in scored.samples if sample.error}
    assert errors == {"q3": "answer: lost: it went away", "q7": "score: KeyError: 'no such colour'"}
    assert [sample.sample_id for sample in scored.samples] == [f"q{number}" for number in range(N_DOCS)]
    kept = [sample for sample in scored.samples if sample.error is None]
    assert kept and all(sample.scores for sample in kept)
    for sample, other in zip(whole.samples, scored.samples, strict=True):
        assert other.scores == ({} if other.error else sample.scores)
    row = next(row for row in scored.metrics if (row.metric, row.filter) == ("reported", "word"))
    assert row.n == len(kept)
    assert row.value == pytest.approx(sum(sample.scores["reported,word"] for sample in kept) / len(kept))
    lossy = next(sample for sample in scored.samples if sample.sample_id == "q3")
    assert lossy.prediction is None and lossy.prompt_tokens is None and lossy.target == "red"
    # Nothing answered gives no metric, and an aggregation that fails names the task.
    nothing = run(benchmark, FakeClient({"": lost()}))
    assert nothing.metrics == () and nothing.problem is None and len(nothing.samples) == N_DOCS
    found = run(benchmark, folder="/no/such/folder")
    assert "metrics of task 'filtered' cannot be computed: FileNotFoundError" in (found.problem or "")
    assert not found.metrics and {sample.error for sample in found.samples} == {None}


def test_a_filter_that_fails_takes_one_document(tasks: Path) -> None:
    benchmark = Benchmark("filtered", include_path=tasks, limit=5)

    class Choosy:
        def apply(self, resps: Any, docs: Any) -> Any:
            for resp, doc in zip(resps, docs, strict=True):
                assert doc["number"] != 2 or not resp
            return resps

    benchmark._task._filters[1].filters.insert(0, Choosy())
    scored = run(benchmark)
    assert [sample.sample_id for sample in scored.samples if sample.error] == ["q2"]
    assert scored.samples[2].error is not None and scored.samples[2].error.startswith("score: AssertionError")
    # Filters see the document of each answer, also where one before it is missing.
    scored = run(benchmark, FakeClient({"thing 0?": lost()}))
    assert [sample.sample_id for sample in scored.samples if sample.error] == ["q0", "q2"]


class Leaving(FakeClient):
    """Visual tokens leave after another layer for every question."""

    async def complete(self, request: Request) -> Completion | Failure:
        found = await super().complete(request)
        assert isinstance(found, Completion)
        return replace(found, exit_layer=len(self.requests))


def test_samples_carry_answers_costs_kinds_and_exit_layers(tasks: Path) -> None:
    samples = run(Benchmark("rounds", include_path=tasks, limit=3), Leaving()).samples
    assert [len((sample.prediction or "").split("\n")) for sample in samples] == [1, 2, 3]
    assert [sample.kind for sample in samples] == ["kind 0", "kind 1", "kind 2"]
    last = samples[-1]
    assert (last.prompt_tokens, last.visual_tokens, last.completion_tokens) == (90, 60, 6)
    assert (last.queue_ms, last.prefill_ms, last.decode_ms) == (3.0, 6.0, 12.0)
    assert last.latency_ms is not None and last.latency_ms > 0
    # An exit layer of several answers there is only where they agree.
    assert samples[0].exit_layer is not None and last.exit_layer is None
    choices = run(Benchmark("choices", include_path=tasks, limit=4)).samples
    assert {sample.prediction for sample in choices} <= {"red", "green", "blue"}
    assert all((sample.scores["acc"] == 1) == (sample.prediction == sample.target) for sample in choices)


def test_the_new_kind_of_question_is_found_by_its_name() -> None:
    benchmark = Benchmark("shapes_new")
    assert (benchmark.num_docs, benchmark.main_metric) == (460, "exact_match")
    assert {sample.kind for sample in run(Benchmark("shapes_new", limit=3)).samples} == {"shape-of-colour"}
    assert all(sample.kind in KINDS for sample in run(Benchmark("shapes_vqa", limit=3)).samples)


def test_requests_carry_images_settings_and_seeds(tasks: Path) -> None:
    def requests(task: str, plan: str = "", **more: Any) -> list[Request]:
        client = FakeClient()
        respond(Benchmark(task, include_path=tasks, **more), client, plan=plan, concurrency=1, timeout_s=5)
        return client.requests

    (first,) = requests("shapes_vqa", "some", limit=1)
    assert (first.plan, first.timeout_s, first.continuation) == ("some", 5, None)
    assert first.sampling == GenerationSettings(max_new_tokens=8, until="</s>").sampling_params()
    image, text = first.messages[0].parts
    assert isinstance(text, str) and isinstance(image, bytes) and Image.open(io.BytesIO(image)).mode == "RGB"
    repeated = requests("plain", limit=3, gen_kwargs={"temperature": 0.5})
    seeds = [request.sampling.seed for request in repeated]
    assert len(set(seeds)) == 6 and None not in seeds and repeated[0].sampling.temperature == 0.5
    assert seeds == [request.sampling.seed for request in requests("plain", limit=3)]


def test_a_limit_is_a_count_or_a_share(tasks: Path) -> None:
    for limit, count in ((None, N_DOCS), (5, 5), (5.0, 5), (0.3, 8), (1000, N_DOCS)):
        benchmark = Benchmark("filtered", include_path=tasks, limit=limit)
        assert (benchmark.num_docs, len(benchmark.instances(range(count)))) == (count, count)


def test_digests_cover_settings_code_and_each_document(tasks: Path, tmp_path: Path) -> None:
    def digest(folder: Path = tasks, **more: Any) -> str:
        return Benchmark("filtered", include_path=folder, **more).digest

    own = digest()
    copy = Path(shutil.copytree(tasks, tmp_path / "copy"))
    assert digest() == digest(copy) == digest(limit=3) == own
    changed = [digest(gen_kwargs={"max_new_tokens": 6}), digest(seed=1)]
    code = copy / "code.py"
    code.write_text(code.read_text().replace("len(items)", "sum(1 for _ in items)"))
    changed.append(digest(copy))
    assert len({own, *changed}) == 4
    before = Benchmark("filtered", include_path=copy).document_digests
    table = pq.read_table(copy / "docs.parquet")
    answers = table["answer"].to_pylist()
    answers[5] = "another"
    columns = {name: table[name] for name in table.column_names} | {"answer": pa.array(answers)}
    pq.write_table(pa.table(columns), copy / "docs.parquet")
    after = Benchmark("filtered", include_path=copy).document_digests
    assert len(set(before.tolist())) == N_DOCS and np.flatnonzero(before != after).tolist() == [5]


def test_requests_under_several_plans_are_made_once_and_give_what_each_plan_gives_alone(tasks: Path) -> None:
    for task in ("filtered", "plain", "rounds", "choices"):
        benchmark, client = Benchmark(task, include_path=tasks, limit=5), WorkClient({"thing 3?": lost()})
        instances = benchmark.instances(range(5))
        with ThreadPoolExecutor(1) as pool:
            how = {"seed": benchmark.seed, "timeout_s": 5.0, "pool": pool}
            found = asyncio.run(
                respond_under_plans(client, instances, benchmark.documents, plans=("", "fast"), **how)  # type: ignore[arg-type]
            )
        alone = [replace(one, latency_ms=0.0) for one in respond(benchmark, FakeClient({"thing 3?": lost()}))]
        for plan in ("", "fast"):
            assert [replace(one, latency_ms=0.0) for one in found[plan]] == alone
        # The first round of both plans is one request.
        assert [work.plans for work in client.works[: len(instances)]] == [("", "fast")] * len(instances)
        assert all(len(work.plans) == 1 for work in client.works[len(instances) :])
        assert (len(client.works) > len(instances)) == (task == "rounds")
        seeds = [work.request.sampling.seed for work in client.works]
        assert task != "plain" or len(set(seeds)) == len(instances) == 10


def test_images_travel_as_pixels_and_once_for_the_choices_of_a_document(tasks: Path) -> None:
    benchmark, client = Benchmark("shapes_vqa", limit=1), WorkClient()
    with ThreadPoolExecutor(1) as pool:
        how: dict[str, Any] = {"seed": 0, "timeout_s": 5.0, "pool": pool, "plans": ("",)}
        asyncio.run(respond_under_plans(client, benchmark.instances([0]), benchmark.documents, **how))
        image, _ = client.works[0].request.messages[0].parts
        sent = FakeClient()
        respond(benchmark, sent)
        file: Any = sent.requests[0].messages[0].parts[0]
        assert isinstance(image, np.ndarray) and image.dtype == np.uint8
        assert (image == np.asarray(Image.open(io.BytesIO(file)))).all()
        choices, client = Benchmark("choices", include_path=tasks, limit=2), WorkClient()
        asyncio.run(respond_under_plans(client, choices.instances(range(2)), choices.documents, **how))
    first, second = client.works[:3], client.works[3:]
    assert (
        len({id(work.request.messages) for work in first}) == len({id(work.request.messages) for work in second}) == 1
    )
    assert [work.request.continuation for work in first] == [" red", " green", " blue"]


def test_a_document_for_which_the_task_fails_is_an_error_of_its_own(tasks: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tasks, tmp_path / "copy"))
    text = (folder / "filtered.yaml").read_text()
    (folder / "filtered.yaml").write_text(text.replace('"Which colour has thing {{number}}?"', "!function code.ask"))
    code = "\ndef ask(doc):\n    return f'Which colour has thing {10 // (doc[\"number\"] - 3)}?'\n"
    (folder / "code.py").write_text((folder / "code.py").read_text() + code)
    benchmark = Benchmark("filtered", include_path=folder, limit=6)
    assert [one.doc_id for one in benchmark.instances(range(6))] == [0, 1, 2, 4, 5]
    assert list(benchmark.unusable) == [3] and "ZeroDivisionError" in benchmark.unusable[3]


def test_values_of_any_type_are_kept_as_text_for_the_metrics() -> None:
    for value in (1.5, True, None, "é", float("inf"), [1, (2, "x")], {"a": {1: (2,)}, "b": {3, 4}}, np.float32(0.1)):
        text = json.dumps(_storable(value))
        assert _loaded(text) == (value.item() if isinstance(value, np.generic) else value)
    with pytest.raises(TypeError, match="Image"):
        _storable(Image.new("RGB", (1, 1)))


def test_what_cannot_be_a_benchmark_is_said(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.api.task import ConfigurableTask

    # lmms-eval tries to load data five times, two seconds apart.
    monkeypatch.setattr(ConfigurableTask.download.retry, "sleep", lambda seconds: None)
    with pytest.raises(Refused, match="has no task 'shape_vqa'; did you mean shapes_vqa"):
        Benchmark("shape_vqa", include_path=tasks)
    with pytest.raises(Refused, match="'mmmu' is the name of a group of tasks"):
        Benchmark("mmmu", include_path=tasks)
    # A task of lmms-eval itself, whose data is on a hub that tests cannot reach.
    with pytest.raises(ShortVError, match=r"'gqa' could not be loaded: .*check that its data set"):
        Benchmark("gqa", include_path=tasks)
    with pytest.raises(Refused, match="'agentic' is of output_type generate_until_agentic"):
        Benchmark("agentic", include_path=tasks)
    with pytest.raises(Refused, match="unknown setting 'nonsense'"):
        Benchmark("filtered", include_path=tasks, gen_kwargs={"nonsense": 1})
    assert Benchmark("filtered", include_path=tasks).main_metric == "exact_match"


def test_images_lose_nothing_on_their_way() -> None:
    noise = Image.effect_noise((9, 7), 80).convert("RGB")
    images = [noise.convert(mode) for mode in ("RGB", "L", "P", "CMYK", "RGBA", "1")]
    content = [{"type": "image", "url": image} for image in images]
    arguments = ("", lambda doc: [{"role": "user", "content": content}], {}, 0, "t", "test")
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    request = Conversation(Instance("generate_until", arguments, 0, metadata), {"t": {"test": [0]}}).request()
    for image, file in zip(images, request.messages[0].parts, strict=True):
        assert isinstance(file, bytes)
        assert Image.open(io.BytesIO(file)).tobytes() == image.convert("RGB").tobytes()


def test_documents_are_read_when_their_request_is_due(tasks: Path) -> None:
    client = FakeClient({"thing 4?": lost()})
    benchmark = Benchmark("filtered", include_path=tasks, limit=12)
    made = benchmark.instances(range(12))
    task = made[0].args[1].__self__
    read: list[int] = []
    seen: list[str] = []

    def messages(doc: Any) -> Any:
        read.append(doc["number"])
        assert len(read) - len(client.requests) <= 3
        if doc["number"] == 7:
            raise ValueError("no\nprompt")
        return task.doc_to_messages(doc)

    def note(conversation: Conversation, response: Response) -> None:
        seen.append(conversation.name)

    instances = [replace(one, arguments=(one.args[0], messages, *one.args[2:])) for one in made]
    found = asyncio.run(send_all(client, instances, benchmark.documents, seed=1, concurrency=2, on_response=note))
    assert read == list(range(12)) and client.most <= 2 and len(seen) == 12
    assert [at for at, response in enumerate(found) if response.failure] == [4, 7]
    message = "document 7 of task 'filtered' gives no prompt: ValueError: no prompt"
    assert found[7].failure == Failure(reason=Reason.INVALID, message=message)


def test_an_unexpected_exception_of_the_client_is_one_documents_error(tasks: Path) -> None:
    scored = run(Benchmark("filtered", include_path=tasks, limit=4), FakeClient({"thing 2?": KeyError("bug")}))
    assert [sample.error for sample in scored.samples] == [None, None, "answer: internal: KeyError: 'bug'", None]


def test_stops_that_a_task_names_are_kept_and_those_that_lmms_eval_adds_are_not(tasks: Path) -> None:
    stops = []
    for task, gen_kwargs in (("paragraphs", None), ("filtered", None), ("filtered", {"until": "\n\n"})):
        benchmark = Benchmark(task, include_path=tasks, limit=1, gen_kwargs=gen_kwargs)
        stops.append(Conversation(benchmark.instances([0])[0], benchmark.documents).settings.stop)
    assert stops == [("\n\n",), (), ("\n\n",)]


def test_an_error_of_the_caller_ends_everything(tasks: Path) -> None:
    client = FakeClient()

    def stop(conversation: Conversation, response: Response) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        respond(Benchmark("filtered", include_path=tasks), client, concurrency=2, on_response=stop)
    assert len(client.requests) <= 2
