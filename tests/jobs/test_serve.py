"""jobs/serve.py as its users meet it: OpenAI's own client, bad input, overload, and what it leaves behind."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from jobs.serve import main
from shortv.evals.generation import generate
from shortv.families import load_architecture
from shortv.families.preprocessing import message_of, prompt_of
from shortv.layers.apply import executing
from shortv.plan import Mode, Plan
from shortv.sample import Sample
from tests.tiny_model import bundled, calibration
from tests.workers.serving.endpoint_fakes import image_part, picture, uri

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
MODEL = "shortv/tiny/model"
KEY, WORD = secrets.token_hex(16), secrets.token_hex(12)
MODES = {"last-3": (Mode.FREEZE_VISUAL, (5, 6, 7)), "exit-4": (Mode.DROP_VISUAL, (4, 5, 6, 7))}
FULL = (Mode.FULL,) * 8


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A running endpoint: where it is, and where its cluster and it itself write."""

    output: Path
    logs: Path
    plans: dict[str, Plan]
    client: openai.OpenAI

    def ask(self, asked: Sample | str | list[Any] = "how many?", model: str = "shortv-tiny", **more: Any) -> Any:
        if isinstance(asked, Sample):
            images = [image_part(uri(image)) for image in asked.images]
            asked = [*images, {"type": "text", "text": asked.prompt}]
        messages: Any = [{"role": "user", "content": asked}]
        return self.client.chat.completions.create(model=model, messages=messages, **more)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    architecture = load_architecture(str(ROOT / MODEL))
    sizes: Any = {"num_layers": architecture.num_layers, "config_digest": architecture.config_digest}
    plans = {name: Plan.of_layers(*modes, name=name, model=MODEL, **sizes) for name, modes in MODES.items()}
    files = [str(plan.save(folder / f"{name}.json")) for name, plan in plans.items()]
    (folder / "keys").write_text(f"# of the tests\n{secrets.token_hex(16)}\n{KEY}\n")
    port, output = free_port(), folder / "output"
    command = [sys.executable, "jobs/serve.py", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--api-key-file", str(folder / "keys"), "--batch-size", "2", "--max-queued", "4"]
    command += [part for file in files for part in ("--plan", file)]
    with output.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
    own = psutil.Process(process.pid)
    try:
        deadline = time.monotonic() + 600
        while "is ready" not in output.read_text():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        started = own.children(recursive=True)
        found = re.search(r"--log_dir=(\S+)", " ".join(part for one in started for part in one.cmdline()))
        assert found is not None
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=90) as client:
            yield Endpoint(output=output, logs=Path(found[1]), plans=plans, client=client)
        started = own.children(recursive=True)
        process.terminate()
        assert process.wait(300) == 0
        _, alive = psutil.wait_procs(started, timeout=300)
        assert [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
        # All that its user has read, beside a line per request.
        lines = output.read_text().splitlines()
        assert sum(map(is_access, lines)) > 50
        assert [line for line in lines if not is_access(line)] == [
            "serving shortv-tiny, shortv-tiny@last-3, shortv-tiny@exit-4",
            f"http://127.0.0.1:{port}/v1 is ready; Ctrl-C stops it",
            "stopped",
        ]
    finally:
        left = [own, *own.children(recursive=True)] if process.poll() is None else []
        for one in left:
            one.kill()
        process.wait(10)


def is_access(line: str) -> bool:
    return re.search(r" INFO \w+ (GET|POST) /v1/\S+ status=\d+ \S+ received=\d+ sent=\d+ ms=", line) is not None


def in_process(sample: Sample, modes: tuple[Mode, ...]) -> tuple[str, int, int]:
    """Text, tokens of the prompt and of the answer as transformers' generate has them."""
    loaded = bundled()
    arguments = {"do_sample": False, "max_new_tokens": 24}
    with executing(loaded.model, modes):
        (found,) = generate(loaded, [prompt_of(loaded, (message_of(sample),))], arguments)
    return found.text, found.prompt_tokens, found.completion_tokens


def test_openais_client_asks_under_every_plan(endpoint: Endpoint) -> None:
    names = {"shortv-tiny": FULL} | {f"shortv-tiny@{name}": plan.modes for name, plan in endpoint.plans.items()}
    assert {model.id for model in endpoint.client.models.list()} == set(names)
    assert endpoint.client.models.retrieve("shortv-tiny@last-3").shortv["plan"] == "last-3"
    texts = set()
    for name, modes in names.items():
        for sample in calibration()[3:6]:
            answer = endpoint.ask(sample, name, max_tokens=24)
            choice, usage, digest = answer.choices[0], answer.usage, answer.shortv["plan_digest"]
            found = (choice.message.content, usage.prompt_tokens, usage.completion_tokens)
            assert found == in_process(sample, modes)
            assert 0 < usage.visual_tokens < usage.prompt_tokens
            plan = endpoint.plans.get(name.partition("@")[2])
            assert digest == (plan.digest if plan else None) and answer.shortv["prefill_ms"] > 0
            texts.add((sample.sample_id, found[0]))
    # The plans do change answers.
    assert len(texts) > 3


def test_openais_client_streams_and_asks_for_log_probabilities(endpoint: Endpoint) -> None:
    sample, model = calibration()[3], "shortv-tiny@last-3"
    whole = endpoint.ask(sample, model, max_tokens=24)
    chunks = list(endpoint.ask(sample, model, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and sum(map(bool, pieces)) > 3
    assert chunks[-1].usage == whole.usage
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 7, "logprobs": True, "top_logprobs": 3, "max_tokens": 8}
    first, second = (endpoint.ask(sample, **settings, extra_body={"shortv": {"min_tokens": 8}}) for _ in range(2))
    assert first.choices == second.choices
    tokens = first.choices[0].logprobs.content
    assert len(tokens) == 8 and all(one.logprob < 0 and len(one.top_logprobs) == 3 for one in tokens)


def test_bad_input_is_refused_in_openais_form_and_nothing_of_it_is_written(endpoint: Endpoint) -> None:
    bad: list[tuple[type[openai.APIStatusError], str, Any, dict[str, Any]]] = [
        (openai.BadRequestError, "cannot be decoded", [image_part(uri(WORD.encode()))], {}),
        (openai.BadRequestError, "image", [image_part(uri(picture("JPEG", (512, 512))[:3000], "jpeg"))], {}),
        (openai.BadRequestError, "never fetched", [image_part(f"http://127.0.0.1:1/{WORD}.png")], {}),
        (openai.BadRequestError, "1000000 are allowed", "a" * 10_000_000, {}),
        (openai.BadRequestError, "context", f"{WORD} " * 2000, {}),
        (openai.BadRequestError, "logit_bias", WORD, {"logit_bias": {WORD: 1}}),
        (openai.NotFoundError, "shortv-tiny, shortv-tiny@exit-4, shortv-tiny@last-3", WORD, {"model": WORD}),
    ]
    for kind, said, content, more in bad:
        with pytest.raises(kind, match=said):
            endpoint.ask(content, **more)
    with pytest.raises(openai.AuthenticationError):
        endpoint.client.with_options(api_key="0" * 32).models.list()
    assert endpoint.ask(f"{WORD} what is there?", max_tokens=4).choices[0].message.content
    files = [path for path in [endpoint.output, *endpoint.logs.rglob("*")] if path.is_file()]
    assert len(files) > 5
    for path in files:
        data = path.read_bytes()
        assert WORD.encode() not in data and KEY.encode() not in data, path


def test_a_client_that_leaves_its_stream_frees_its_place(endpoint: Endpoint) -> None:
    # More of them than there are places, in batches and in the queue together.
    for _ in range(12):
        stream = endpoint.ask(max_tokens=800, extra_body={"shortv": {"min_tokens": 800}}, stream=True)
        next(iter(stream))
        stream.close()
    assert endpoint.ask(max_tokens=2).choices


def test_overload_is_turned_away_and_nobody_hangs(endpoint: Endpoint) -> None:
    def ask(_: int) -> int:
        try:
            endpoint.ask(max_tokens=200, extra_body={"shortv": {"min_tokens": 200}})
        except openai.APIStatusError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            return error.status_code
        return 200

    with ThreadPoolExecutor(40) as pool:
        found = Counter(pool.map(ask, range(40)))
    assert found.keys() <= {200, 429, 503} and found.total() == 40
    assert 2 <= found[200] < 40
    assert endpoint.ask(max_tokens=2).choices


def test_what_cannot_be_right_is_refused_before_work_starts(job: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for arguments, message in (
            (("--host", "0.0.0.0"), "give --api-key-file"),
            (("--plan", tmp_path / "none.json"), "none.json"),
            (("--api-key-file", tmp_path / "none"), "cannot be read"),
            (("--port", port), f"127.0.0.1:{port} cannot be bound"),
        ):
            status, said = job(main, *arguments)
            assert status == 2 and message in said and said.count("\n") == 1
