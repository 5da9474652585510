"""Small lmms-eval tasks without images, and one fake model for lmms-eval and for replicas."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow as pa
from lmms_eval.api.model import lmms
from pyarrow import parquet as pq

from shortv.evals.benchmark import Benchmark
from shortv.evals.dispatch import Response, send_all
from shortv.evals.scoring import MetricRow, ScoredSample
from shortv.request import Completion, Failure, Likelihood, Reason, Replies, Request, Work

TINY_TASK = Path(__file__).parents[2] / "shortv/tiny/task"
N_DOCS = 24
HEAD = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: docs.parquet}}}}
test_split: test
doc_to_text: "Which colour has thing {{{{number}}}}?"
doc_to_target: answer
"""
TASKS = {
    # Two filters, lmms-eval's own metric, an aggregation that writes a file, scores that are not bare numbers.
    "filtered": """
output_type: generate_until
generation_kwargs: {temperature: 0, max_new_tokens: 5}
process_results: !function code.process_results
filter_list:
  - {name: none, filter: [{function: take_first}]}
  - {name: word, filter: [{function: regex, regex_pattern: "(red|blue)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: reported, aggregation: !function code.report, higher_is_better: true}
cluster_key: kind
""",
    "plain": """
output_type: generate_until
generation_kwargs: {temperature: 0.7, do_sample: true}
repeats: 2
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
""",
    "rounds": """
output_type: generate_until_multi_round
doc_to_messages: !function code.rounds
process_results: !function code.process_rounds
metric_list:
  - {metric: rounds, aggregation: mean, higher_is_better: true}
""",
    "choices": """
output_type: multiple_choice
doc_to_choice: [red, green, blue]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "paragraphs": """
output_type: generate_until
generation_kwargs: {until: ["\\n\\n"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    # As many tasks do: a score of 0 where the judge does not answer.
    "judged": """
output_type: generate_until
process_results: !function code.process_judged
metric_list:
  - {metric: judged, aggregation: mean, higher_is_better: true}
""",
    "judged_together": """
output_type: generate_until
process_results: !function code.process_results
metric_list:
  - {metric: reported, aggregation: !function code.judge_together, higher_is_better: true}
""",
    "agentic": "output_type: generate_until_agentic",
}
CODE = """
import os
import requests

def judge(text):
    payload = {"model": "judge", "messages": [{"role": "user", "content": text}]}
    for attempt in range(3):
        try:
            response = requests.post(os.environ["JUDGE_URL"], json=payload, timeout=60)
            response.raise_for_status()
            return response.json()["choices"][0]["message"]["content"]
        except Exception:
            pass
    return ""

def process_judged(doc, results):
    return {"judged": float(doc["answer"] in judge(f"{doc['number']}: {results[0]}"))}

def judge_together(items):
    return float(len(judge(str(sum(item["score"] for item in items)))))

def process_results(doc, results):
    if "boom" in results[0]:
        raise KeyError("no such colour")
    right = float(results[0].lower() == doc["answer"])
    return {"exact_match": right, "reported": {"score": right, "kind": doc["kind"]}}

def report(items, args):
    with open(os.path.join(args.output_path, "report.txt"), "w") as file:
        file.write(str(len(items)))
    return sum(item["score"] for item in items) / len(items)

def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
    text = f"Which colour has thing {doc['number']}? Round {round_idx or 0}"
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    if not round_idx:
        return messages
    over = round_idx > doc["number"] % 3
    return None if over else messages, over, previous_output, {"round": round_idx}

def process_rounds(doc, results):
    return {"rounds": float(len(results[0])) + len(results[0][-1]) / 100}
"""


def write_tasks(folder: Path) -> Path:
    """Write the tasks and their documents, whose numbers count from 0."""
    colours = ["red", "green", "blue"]
    columns = {
        "number": list(range(N_DOCS)),
        "answer": [colours[number * number % 3] for number in range(N_DOCS)],
        "kind": [f"kind {number % 4}" for number in range(N_DOCS)],
        "question_id": [f"q{number}" for number in range(N_DOCS)],
    }
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "docs.parquet")
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name) + rest)
    (folder / "code.py").write_text(CODE)
    return folder


def answer_to(text: str) -> str:
    """A colour or a number that depends on the question alone; some answers think aloud first."""
    drawn = hashlib.sha256(text.encode()).digest()
    word = ["red", "Red", "blue", "green", "yes", "no", "2", "3"][drawn[0] % 8]
    return f"<think>green? no</think> {word}" if drawn[1] % 3 == 0 else word


def likelihood_of(text: str, continuation: str) -> Likelihood:
    """A likelihood that depends on the texts alone."""
    drawn = hashlib.sha256(f"{text}|{continuation}".encode()).digest()
    return Likelihood(log_probability=-drawn[0] / 16 - 0.5, is_greedy=drawn[1] % 2 == 0)


class FakeClient:
    """Completes as `answer_to`; gives or raises `failures` for requests whose text contains their key."""

    def __init__(self, failures: Mapping[str, Failure | str | Exception] | None = None) -> None:
        self.failures = failures or {}
        self.requests: list[Request] = []
        self.now = self.most = 0

    async def complete(self, request: Request) -> Completion | Failure:
        self.requests.append(request)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        text = text_of(request)
        given = next((given for key, given in self.failures.items() if key in text), answer_to(text))
        if isinstance(given, Exception):
            raise given
        return given if isinstance(given, Failure) else completion(given)

    async def score(self, request: Request) -> Likelihood | Failure:
        return likelihood_of(text_of(request), request.continuation or "")

    async def aclose(self) -> None:
        pass


class WorkClient(FakeClient):
    """The same for works: a request under several plans; a plan's name is a part of the text."""

    def __init__(self, failures: Mapping[str, Failure | str | Exception] | None = None) -> None:
        super().__init__(failures)
        self.works: list[Work] = []

    async def complete_all(self, works: Sequence[Work]) -> Replies:
        self.works += works
        return Replies(results=tuple([await self._under_plans(work) for work in works]))

    async def _under_plans(self, work: Work) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for plan in work.plans:
            request = replace(work.request, plan=plan)
            found[plan] = await (self.complete(request) if request.continuation is None else self.score(request))
        return found


class Scored(NamedTuple):
    samples: Sequence[ScoredSample]
    metrics: Sequence[MetricRow]
    problem: str | None


def respond(benchmark: Benchmark, client: Any, *, concurrency: int = 3, **how: Any) -> list[Response]:
    """Send all requests of a benchmark under one plan."""
    instances = benchmark.instances(range(benchmark.num_docs))
    how = {"seed": benchmark.seed, "concurrency": concurrency, **how}
    return asyncio.run(send_all(client, instances, benchmark.documents, **how))


def scored(benchmark: Benchmark, responses: Sequence[Response], folder: str | None = None) -> Scored:
    """Score the responses to all requests of a benchmark."""
    samples = benchmark.score(range(benchmark.num_docs), responses)
    rows, problem = benchmark.aggregate((one.values for one in samples if one.values is not None), folder=folder)
    return Scored(samples, rows, problem)


def text_of(request: Request) -> str:
    return "".join(part for message in request.messages for part in message.parts if isinstance(part, str))


def completion(text: str, **more: Any) -> Completion:
    given = {"plan_digest": None, "queue_ms": 1.0, "prefill_ms": 2.0, "decode_ms": 4.0, **more}
    return Completion(text=text, finish_reason="stop", prompt_tokens=30, visual_tokens=20, completion_tokens=2, **given)


def lost(message: str = "it went away") -> Failure:
    return Failure(reason=Reason.LOST, message=message)


class FakeModel(lmms):  # type: ignore[misc]
    """The same answers for lmms-eval's own evaluation."""

    is_simple = False

    def generate_until(self, requests: Any) -> list[str]:
        return [texts[0] for texts in self.generate_until_multi_round(requests)]

    def loglikelihood(self, requests: Any) -> list[Any]:
        # lmms-eval's models give losses, and its multiple choice counts on it.
        scores = [likelihood_of(request.args[0], request.args[1]) for request in requests]
        return [(-score.log_probability, score.is_greedy) for score in scores]

    def generate_until_multi_round(self, requests: Any) -> list[list[str]]:
        found = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            answers, info, over = [answer_to(_texts(doc_to_messages(doc)))], None, "multi" not in request.request_type
            while not over:
                messages, over, answers, info = doc_to_messages(
                    doc, round_idx=len(answers), previous_output=answers, previous_round_info=info
                )
                answers += [] if over else [answer_to(_texts(messages))]
            found.append(answers)
        return found


class SimpleFakeModel(FakeModel):
    is_simple = True


def _texts(messages: Any) -> str:
    return "".join(part["text"] for turn in messages for part in turn["content"] if part["type"] == "text")


def simple_evaluation(model: Any, task: str, folder: Path, output: Path, **more: Any) -> Mapping[str, Any]:
    """What lmms-eval's own evaluation says, with its command's defaults."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tags = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
    arguments = SimpleNamespace(process_with_media=False, reasoning_tags=tags, output_path=str(output))
    manager = TaskManager(include_path=[str(folder)], include_defaults=False)
    found = simple_evaluate(model, tasks=[task], task_manager=manager, cli_args=arguments, **more)
    return {name: value for name, value in found["results"][task].items() if "," in name}
