"""The model `shortv` of lmms-eval."""

import io
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

import shortv
from shortv.errors import Refused, ShortVError
from shortv.evals import local
from shortv.evals.local import ShortV, SimpleShortV
from shortv.evals.requests import GenerationSettings
from shortv.families import load_architecture
from shortv.plan import Mode, Plan
from shortv.request import SamplingParams
from shortv.tiny.accuracy import MODEL, Question, generate_answers, measure_accuracy, read_questions
from tests.processors import CHECKPOINTS, save_checkpoint

ROOT = Path(__file__).parents[2]
TASK = ROOT / "shortv/tiny/task"
QUESTIONS = read_questions(limit=40)
GREEDY = {"max_new_tokens": 8, "temperature": 0.0, "do_sample": False, "until": ["</s>"]}


def plan_of(layers: Sequence[int], model: str = str(MODEL)) -> Plan:
    sizes = load_architecture(model)
    made_for = {"num_layers": sizes.num_layers, "config_digest": sizes.config_digest, "model": "tiny"}
    return Plan.of_layers(Mode.FREEZE_VISUAL, layers, name="some", **made_for)


# Freezing nearly everything costs the bundled model answers, so that plans can be told apart.
HARSH = plan_of(range(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def full() -> ShortV:
    return ready(ShortV(batch_size=8, device="cpu"))


@pytest.fixture(scope="module")
def harsh(folder: Path) -> ShortV:
    return ready(ShortV(plan=HARSH.save(folder / "harsh.json"), batch_size="8", device="cpu"))


def ready(model: ShortV) -> ShortV:
    model.task_dict = {"shapes": {"test": QUESTIONS}}
    return model


def picture(question: Question) -> Image.Image:
    return Image.open(io.BytesIO(question.image))


def messages(question: Question) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": picture(question)}, {"type": "text", "text": question.prompt}]
    return [{"role": "user", "content": content}]


def instance(kind: str, at: int, *arguments: Any) -> Instance:
    metadata = {"task": "shapes", "doc_id": at, "repeats": 1}
    return Instance(request_type=kind, arguments=(*arguments, at, "shapes", "test"), idx=0, metadata=metadata)


def ask(
    model: ShortV,
    gen_kwargs: dict[str, Any] = GREEDY,
    doc_to_messages: Callable[[Question], Any] = messages,
    documents: Sequence[int] = range(len(QUESTIONS)),
) -> list[str]:
    requests = [instance("generate_until", at, QUESTIONS[at].prompt, doc_to_messages, gen_kwargs) for at in documents]
    return [answer.text for answer in model.generate_until(requests)]


def test_answers_are_those_of_the_benchmark_for_any_batch_size(
    full: ShortV, harsh: ShortV, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = full._loaded.model, full._loaded.processor
    unplanned = list(generate_answers(model, processor, QUESTIONS))
    with shortv.apply(model, HARSH):
        planned = list(generate_answers(model, processor, QUESTIONS))
    assert planned != unplanned
    for answering, wanted in ((full, unplanned), (harsh, planned)):
        assert ask(answering) == wanted
        with monkeypatch.context() as patch:
            patch.setattr(answering, "batch_size", 1)
            assert ask(answering, documents=range(10)) == wanted[:10]


def test_a_plan_of_smaller_images_changes_answers_to_images_alone(full: ShortV, folder: Path) -> None:
    plan = replace(plan_of(()), name="small", downsample=0.1)
    small = ready(ShortV(plan=plan.save(folder / "small.json"), batch_size=8, device="cpu"))
    assert 0 < sum(one != other for one, other in zip(ask(full), ask(small), strict=True)) < len(QUESTIONS) / 2

    def text(one: Question) -> Any:
        return [{"role": "user", "content": [{"type": "text", "text": one.prompt}]}]

    assert ask(small, doc_to_messages=text) == ask(full, doc_to_messages=text)
    with pytest.raises(Refused, match="smaller images"), shortv.apply(full._loaded.model, plan):
        pass


def test_the_simple_form_gives_the_same(full: ShortV) -> None:
    model = ready(SimpleShortV(device="cpu", batch_size=8))
    requests = [
        instance("generate_until", at, QUESTIONS[at].prompt, GREEDY, lambda doc: [picture(doc)]) for at in range(16)
    ]
    assert [answer.text for answer in model.generate_until(requests)] == ask(full, documents=range(16))


def test_token_counts_and_stops(full: ShortV) -> None:
    def first(**settings: Any) -> Any:
        return full.generate_until([instance("generate_until", 0, "", messages, {**GREEDY, **settings})])[0]

    answer = first()
    ids = full._loaded.processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    assert answer.token_counts.output_tokens == len(ids) + 1 and answer.token_counts.input_tokens > 36
    assert first(max_new_tokens=1).token_counts.output_tokens == 1
    assert first(until=[answer.text.strip()[0]]).token_counts.output_tokens == 1
    answers = ask(full)
    stop = next(answer for answer in answers if len(answer.strip()) > 2).strip()[1]
    assert ask(full, {**GREEDY, "until": stop}) == [answer.split(stop)[0] for answer in answers] != answers


def test_sampling_follows_its_settings(full: ShortV) -> None:
    greedy = ask(full, documents=range(16))
    hot = {**GREEDY, "temperature": 5.0, "do_sample": True}
    sampled = []
    for _ in range(2):
        torch.manual_seed(0)
        sampled.append(ask(full, hot, documents=range(16)))
    assert sampled[0] == sampled[1] != greedy
    assert ask(full, {**hot, "top_p": 1e-6}, documents=range(16)) == greedy
    assert ask(full, {**GREEDY, "num_beams": 2}, documents=range(16)) == greedy


def test_settings_of_tasks_are_read_alike_for_generate_and_for_replicas() -> None:
    for given in ({"temperature": 0, "do_sample": True}, {"do_sample": True, "top_k": 5}, {"temperature": 0.5}, {}):
        settings = GenerationSettings.read(given)
        arguments, sampling = settings.generate_arguments(), settings.sampling_params()
        assert arguments["do_sample"] == (sampling.temperature > 0)
        assert arguments["max_new_tokens"] == sampling.max_tokens == 1024
    # What a task does not set is left to the model, unless the completion is greedy.
    sampled = GenerationSettings.read({"do_sample": True, "top_p": 0.5, "max_gen_toks": 7, "length_penalty": 2})
    assert sampled.generate_arguments() == {
        "do_sample": True,
        "top_p": 0.5,
        "max_new_tokens": 7,
        "length_penalty": 2.0,
    }
    assert sampled.sampling_params() == SamplingParams(max_tokens=7, temperature=1.0, top_p=0.5)
    given = {"until": ["\n\n", "Q:", ""], "min_new_tokens": 2, "repetition_penalty": 1.2, "top_p": 0.1}
    greedy = GenerationSettings.read({**given, "do_sample": None, "image_aspect_ratio": "original", "num_beams": 1})
    stop = ("\n\n", "Q:")
    assert greedy.sampling_params() == SamplingParams(min_tokens=2, repetition_penalty=1.2, stop=stop)
    assert greedy.stop == stop and greedy.generate_arguments()["top_p"] is None
    with pytest.raises(Refused, match="num_beams=4 is not supported by replicas"):
        GenerationSettings.read({"num_beams": 4}).sampling_params()
    with pytest.raises(Refused, match="unknown setting 'guidance'"):
        GenerationSettings.read({"guidance": 1})
    for name, value in (("max_new_tokens", "many"), ("temperature", [1]), ("top_k", 10**400), ("until", 3)):
        with pytest.raises(Refused, match=f"{name} is "):
            GenerationSettings.read({name: value})


@pytest.mark.parametrize("name", ["full", "harsh"])
def test_likelihoods_are_those_of_single_unpadded_forwards(name: str, request: pytest.FixtureRequest) -> None:
    model: ShortV = request.getfixturevalue(name)
    documents = range(4)
    own = {at: f" {answer.strip()}" for at, answer in zip(documents, ask(model, documents=documents), strict=True)}
    asked = [(at, text) for at in documents for text in dict.fromkeys([" red", " blue circle", " yes", own[at]])]
    requests = [
        instance("loglikelihood", at, QUESTIONS[at].prompt, text, lambda doc: [picture(doc)]) for at, text in asked
    ]
    found = model.loglikelihood(requests)
    for (at, text), (log_probability, is_greedy) in zip(asked, found, strict=True):
        assert log_probability == pytest.approx(teacher_forced(model, QUESTIONS[at], text), abs=1e-3, rel=1e-5)
        assert is_greedy == (text == own[at])


def teacher_forced(model: ShortV, question: Question, text: str) -> float:
    loaded = model._loaded
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
    prompt = loaded.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    both = [
        loaded.processor(text=[part], images=[picture(question)], return_tensors="pt")
        for part in (prompt, prompt + text)
    ]
    start = both[0]["input_ids"].shape[1]
    with model._under_plan(), torch.inference_mode():
        log_TV = loaded.model(**both[1]).logits[0].log_softmax(-1)
    ids = both[1]["input_ids"][0]
    return sum(float(log_TV[at - 1, ids[at]]) for at in range(start, len(ids)))


@pytest.mark.parametrize("processor", CHECKPOINTS)
def test_every_family_answers_alike_in_any_batch(processor: str, tmp_path: Path) -> None:
    folder = save_checkpoint(processor, tmp_path)
    plan_of([1, 2], str(folder)).save(folder)
    # Text alone, one image and two, of several sizes and lengths.
    documents = [(1, "How many red circles?"), (1, "Describe what you see. " * 3), (2, "What?"), (0, "One word.")]

    def visuals(document: tuple[int, str]) -> list[Image.Image]:
        return [Image.new("RGB", (40 + 10 * number, 30), (50 * number, 90, 20)) for number in range(document[0])]

    def doc_to_messages(document: tuple[int, str]) -> Any:
        images = [{"type": "image", "url": image} for image in visuals(document)]
        return [{"role": "user", "content": [*images, {"type": "text", "text": document[1]}]}]

    model = ShortV(pretrained=folder, plan=folder, device="cpu", dtype="float32")
    model.task_dict = {"shapes": {"test": documents}}
    settings = {"max_new_tokens": 6, "temperature": 0, "until": ["zq"]}
    asked = [instance("generate_until", at, "x" * at, doc_to_messages, settings) for at in range(len(documents))]
    pairs = [(at, text, choice) for at, (_, text) in enumerate(documents) for choice in (" red circle", "x")]
    scored = [instance("loglikelihood", at, text, choice, visuals) for at, text, choice in pairs]
    answers, scores = [], []
    for model.batch_size in (1, len(documents)):
        answers.append([answer.text for answer in model.generate_until(asked)])
        scores.append([score for score, _ in model.loglikelihood(scored)])
    assert answers[0] == answers[1] and scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_likelihoods_without_a_document_and_of_targets(full: ShortV) -> None:
    metadata = {"task": "shapes", "doc_id": 0, "repeats": 1}
    alone = Instance(request_type="loglikelihood", arguments=("", " red"), idx=0, metadata=metadata)
    target = instance("loglikelihood", 0, "Is it?", lambda doc: " red", lambda doc: None)
    text = instance("loglikelihood", 0, "Is it?", " red", lambda doc: None)
    scores = full.loglikelihood([alone, target, text])
    assert scores[1] == scores[2] and all(score[0] < 0 for score in scores)
    with pytest.raises(ShortVError, match=r"document 0 of task 'shapes' .*empty continuation"):
        full.loglikelihood([instance("loglikelihood", 0, "Is it?", "", lambda doc: None)])


def test_rounds_go_on_until_the_task_ends_them(full: ShortV) -> None:
    def rounds(
        question: Question, round_idx: int = 0, previous_output: Any = None, previous_round_info: Any = None
    ) -> Any:
        if round_idx == 0:
            return messages(question)
        # Document k has k + 1 rounds.
        over = round_idx > QUESTIONS.index(question)
        assert len(previous_output) == round_idx and previous_round_info == (round_idx - 1 or None)
        return None if over else messages(QUESTIONS[round_idx]), over, previous_output, round_idx

    requests = [instance("generate_until_multi_round", at, "", rounds, GREEDY) for at in range(4)]
    single = ask(full, documents=range(4))
    assert full.generate_until_multi_round(requests) == [
        [single[at], *single[1 : at + 1]] if at else [single[0]] for at in range(4)
    ]


def test_a_request_that_fails_ends_the_run(full: ShortV) -> None:
    def turn(kind: str, url: Any) -> Callable[[Question], Any]:
        return lambda question: [{"role": "user", "content": [{"type": kind, "url": url}]}]

    def broken(question: Question) -> Any:
        raise KeyError("no such column")

    cases: list[tuple[Callable[[Question], Any], type[Exception], str]] = [
        (turn("video", "a.mp4"), Refused, "document 3 of task 'shapes' holds video; .*choose an image task"),
        (turn("audio", {}), Refused, "holds audio"),
        (turn("image", 3), Refused, "has a int as image"),
        (turn("image", "no/such/file.png"), ShortVError, "an image of document 3 .*no/such/file.png.*No such file"),
        (broken, ShortVError, "document 3 of task 'shapes' gives no prompt: KeyError"),
        (lambda question: [{"role": "user", "content": "word " * 2000}], ShortVError, "exceed the model.s context"),
        (
            lambda question: [{"role": "judge", "content": "a"}],
            ShortVError,
            "cannot render .* unknown role judge",
        ),
    ]
    for doc_to_messages, kind, message in cases:
        with pytest.raises(kind, match=message):
            ask(full, doc_to_messages=doc_to_messages, documents=[3])


def test_settings_that_cannot_be_right_are_refused(folder: Path) -> None:
    other = plan_of([1]).save(folder / "other.json")
    cases = {
        "plna=x": "unknown setting 'plna'; did you mean plan",
        "plan": "'plan' has no value",
        "plan=a,plan=b": "named twice",
        "plan=nowhere.json": "nowhere.json",
        "plan=llava-1.5-7b": "32 layers",
        f"plan={other},plan_digest={HARSH.digest}": f"has digest {plan_of([1]).digest}, not",
        f"plan={other},plan_digest=": "at least the first 12",
        "plan_digest=0123456789abcdef": "has digest None",
        "plan=a\0b": "plan is .*NUL",
        "device=tpu9": "device is .tpu9.*use auto",
        "batch_size=0": "batch_size is .0",
        "batch_size=auto": "batch_size is .auto",
        "pretrained=./no/such/model": "does not exist",
    }
    for text, message in cases.items():
        with pytest.raises(Refused, match=message):
            ShortV.create_from_arg_string(text, {"batch_size": 1})


def test_model_args_go_before_flags(folder: Path) -> None:
    path = plan_of([2]).save(folder / "checked.json")
    text = f"pretrained={MODEL},plan={path},plan_digest={plan_of([2]).digest[:16]},device=cpu,batch_size=3"
    model = ShortV.create_from_arg_string(text, {"batch_size": 1, "device": None, "max_batch_size": None})
    assert (model.batch_size, str(model.device), model.plan) == (3, "cpu", plan_of([2]))
    assert ShortV.create_from_arg_string("", {"batch_size": 5}).batch_size == 5


def test_the_response_cache_keys_on_the_plan(folder: Path, tmp_path: Path) -> None:
    from lmms_eval.caching.response_cache import ResponseCache

    def fingerprint(model_args: str) -> str:
        cache = ResponseCache.create(str(tmp_path), model="shortv", model_args=model_args)
        cache.close()
        return cache.model_fingerprint

    path = folder / "keyed.json"
    text = f"plan={path},device=cpu"
    while ResponseCache.create.__qualname__ != "ResponseCache.create":
        fingerprint("")  # Models of other tests, for which no cache was made.
    own = ResponseCache.__dict__["create"]
    seen = []
    for layers in ([1], [2], [1]):
        plan_of(layers).save(path)
        ShortV.create_from_arg_string(text)
        seen.append(fingerprint(text))
        assert plan_of(layers).digest in seen[-1]
        assert ResponseCache.__dict__["create"] is own
    assert seen[0] == seen[2] != seen[1]
    # No cache was made for this one; another model's key is left alone.
    ShortV.create_from_arg_string(text)
    assert "plan_digest" not in fingerprint("pretrained=other")
    assert ResponseCache.__dict__["create"] is own


def test_a_batch_that_does_not_fit_is_halved(full: ShortV, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fitting = 2

    def run(loaded: Any, prompts: Sequence[Any], arguments: Any, stop: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > fitting:
            raise torch.OutOfMemoryError("no")
        return generate(loaded, prompts, arguments, stop)

    generate, wanted = local.generate, ask(full, documents=range(5))
    monkeypatch.setattr(local, "generate", run)
    assert ask(full, documents=range(5)) == wanted and sizes == [5, 2, 3, 1, 2]
    fitting = 0
    with pytest.raises(ShortVError, match="one request alone does not fit"):
        ask(full, documents=range(5))


@pytest.mark.slow
def test_the_command_scores_each_plan_as_the_benchmark_does(full: ShortV, tmp_path: Path) -> None:
    limit = 24
    questions = read_questions(limit=limit)
    plan = tmp_path / "plan.json"
    overall = []
    # The file changes its content between the runs, and both use one response cache.
    for run, layers in enumerate(([6, 7], range(7))):
        plan_of(layers).save(plan)
        rows, results = lmms_eval(plan, tmp_path / f"run{run}", tmp_path / "cache", limit)
        with shortv.apply(full._loaded.model, plan_of(layers)):
            expected = measure_accuracy(full._loaded.model, full._loaded.processor, questions)
        overall.append(results["exact_match,none"])
        assert overall[-1] == pytest.approx(expected.pop("overall"))
        for kind, share in expected.items():
            assert results[f"exact_match_{kind.replace('-', '_')},none"] == pytest.approx(share)
        assert len(rows) == limit
    assert overall[0] > overall[1]
    with sqlite3.connect(tmp_path / "cache/cache.db") as database:
        assert database.execute("SELECT COUNT(*) FROM responses").fetchone() == (2 * limit,)


def lmms_eval(plan: Path, output: Path, cache: Path, limit: int) -> tuple[list[Any], dict[str, float]]:
    flags = f"--model shortv --model_args pretrained={MODEL},plan={plan} --include_path {TASK} --tasks shapes_vqa"
    flags += f" --limit {limit} --batch_size 8 --output_path {output} --log_samples --use_cache {cache} --device cpu"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "datasets")}
    command = [sys.executable, "-m", "lmms_eval", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = output.glob("*/*_results.json")
    (samples,) = output.glob("*/*_samples_shapes_vqa.jsonl")
    rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    return rows, json.loads(results.read_text("utf-8"))["results"]["shapes_vqa"]
