"""Judge calls of tasks against an OpenAI-compatible server on loopback that fails now and then."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import requests
from lmms_eval.llm_judge import ServerConfig, get_server

from shortv.evals.judging import Judge, JudgeFailed, JudgePolicy
from tests.evals.flaky_judge import KEY, FlakyJudge, flaky_judge

QUICK = JudgePolicy(tries=3, timeout_s=60, failures_in_a_row=99)


@pytest.fixture
def server() -> Iterator[FlakyJudge]:
    with flaky_judge() as found:
        yield found


@pytest.fixture(params=["llm_judge", "async llm_judge", "openai", "async openai", "requests"])
def ask(request: pytest.FixtureRequest, server: FlakyJudge, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A task's scoring: it asks the judge, and gives 0 when that fails, as most tasks do."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_URL", server.url)
    ask_once = _users(server.url)[request.param]

    def score(text: str) -> Any:
        try:
            return ask_once(text)
        except Exception:
            return 0

    return score


def _users(url: str) -> dict[str, Callable[[str], Any]]:
    def messages(text: str) -> Any:
        return [{"role": "user", "content": text}]

    def by_llm_judge(kind: str) -> Callable[[str], Any]:
        from lmms_eval.llm_judge import Request

        def call(text: str) -> str:
            judge = get_server(kind, ServerConfig(model_name="judge"))
            return str(judge.evaluate(Request(messages=messages(text))).content)

        return call

    def by_openai(text: str) -> str | None:
        client = openai.OpenAI(base_url=url)
        return client.chat.completions.create(model="judge", messages=messages(text)).choices[0].message.content

    async def by_async_openai(text: str) -> str | None:
        async with openai.AsyncOpenAI(base_url=url) as client:
            found = await client.chat.completions.create(model="judge", messages=messages(text))
        return found.choices[0].message.content

    def by_requests(text: str) -> str:
        payload = {"model": "judge", "messages": messages(text)}
        response = requests.post(f"{url}/chat/completions", json=payload, headers={"Authorization": KEY}, timeout=60)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])

    return {
        "llm_judge": by_llm_judge("openai"),
        "async llm_judge": by_llm_judge("async_openai"),
        "openai": by_openai,
        "async openai": lambda text: asyncio.run(by_async_openai(text)),
        "requests": by_requests,
    }


def test_a_call_is_retried_then_cached_for_every_plan_and_run(server: FlakyJudge, ask: Callable[[str], Any]) -> None:
    pauses: list[float] = []
    judge = Judge(policy=QUICK, sleep=pauses.append)
    server.script = [500, (429, {"retry-after": "7"}), 200, "not JSON", '{"error": "busy"}', 200]
    for text, waits in (("red", [0, 1, 7]), ("blue", [0, 1, 2])):
        with judge.scoring():
            assert ask(text) == text
        assert [pytest.approx(wait) for wait in waits] == pauses
        pauses.clear()
    with judge.scoring():
        assert ask("red") == "red"
    assert len(server.asked) == 6 and len(judge.new) == 2 and KEY not in str(judge.new)
    # A run that resumes knows what was answered; the same question twice in a document is another call.
    resumed = Judge({digest: reply.body for digest, reply in judge.new.items()}, policy=QUICK, sleep=pauses.append)
    with resumed.scoring(doc=3):
        assert ask("blue") == "blue" and len(server.asked) == 6
        assert ask("blue") == "blue" and len(server.asked) == 7
    assert [reply.doc for reply in resumed.new.values()] == [3] and not set(resumed.new) & set(judge.new)


def test_a_producers_thread_is_as_good_as_the_main_one(server: FlakyJudge, ask: Callable[[str], Any]) -> None:
    def score() -> Any:
        with Judge(policy=QUICK).scoring():
            return ask("red")

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(score).result() == "red"


def test_a_failed_call_is_an_error_though_the_task_hides_it(server: FlakyJudge, ask: Callable[[str], Any]) -> None:
    judge = Judge(policy=QUICK, sleep=lambda seconds: None)
    server.script = [503] * 3
    message = r"^judge: 127.0.0.1/v1/chat/completions answered with status 503, tried 3 times"
    with pytest.raises(JudgeFailed, match=message) as caught, judge.scoring():
        ask("red")
        pytest.fail("the task's code goes on, and would retry for minutes")
    assert len(server.asked) == 3 and KEY not in str(caught.value)
    # A refused key is not retried; the next document is judged.
    server.script = [401]
    with pytest.raises(JudgeFailed, match="401"), judge.scoring():
        ask("red")
    with judge.scoring():
        assert ask("green") == "green"
    assert len(server.asked) == 5 and len(judge.new) == 1


def test_a_judge_that_never_ends_its_answer_is_left_behind(server: FlakyJudge, ask: Callable[[str], Any]) -> None:
    policy = JudgePolicy(tries=2, timeout_s=0.3, failures_in_a_row=1)
    judge = Judge(policy=policy, sleep=lambda seconds: None)
    server.script = ["drip", "drip"]
    with pytest.raises(JudgeFailed, match="did not answer in time, tried 2 times"), judge.scoring():
        ask("red")
    # Calls that fail one after the other end the calls, so that a unit of documents does not wait for each.
    with pytest.raises(JudgeFailed, match="not called again after 1 failed calls"), judge.scoring():
        ask("green")
    assert len(server.asked) == 2


def test_a_judge_without_key_or_address_is_a_failure(
    server: FlakyJudge, monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], Any]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server.script = [401]
    with pytest.raises(JudgeFailed), Judge().scoring():
        ask("red")
    hidden = contextlib.suppress(Exception)
    with pytest.raises(JudgeFailed, match="cannot ask: MissingSchema"), Judge().scoring(), hidden:
        requests.post("YOUR_API_URL", json={"messages": []}, timeout=60)
    judge = Judge(policy=JudgePolicy(tries=1))
    with pytest.raises(JudgeFailed, match=r"cannot be reached \(ConnectionError\)"), judge.scoring():
        requests.post("http://127.0.0.1:9/v1/chat/completions", json={"messages": []}, timeout=60)


def test_other_requests_and_errors_pass_and_everything_is_undone(server: FlakyJudge) -> None:
    before = (requests.Session.send, requests.Session.prepare_request, openai.OpenAI.__init__)
    judge = Judge(policy=QUICK)
    server.script = [500]
    with pytest.raises(KeyError, match="colour"), judge.scoring():
        assert requests.get(server.url, timeout=60).status_code == 204
        assert requests.post(server.url, json={"scores": []}, timeout=60).status_code == 500
        raise KeyError("colour")
    assert judge.new == {}
    assert (requests.Session.send, requests.Session.prepare_request, openai.OpenAI.__init__) == before
