"""Too much, too long, too many, and clients that go away."""

import asyncio
import json
import time

import httpx
import pytest

from tests.workers.serving.endpoint_fakes import (
    MODEL,
    PATH,
    FakeReplicas,
    body,
    client_of,
    head,
    image_part,
    picture,
    post,
    problem,
    served,
    uri,
)


def test_a_body_is_bounded_by_what_it_says_and_by_what_it_is() -> None:
    async def go() -> None:
        async with served(FakeReplicas(), max_body_bytes=1000) as port:
            for request in (
                head("Content-Length: 1001"),
                head("Transfer-Encoding: chunked") + b"200\r\n" + b" " * 512 + b"\r\n200\r\n" + b" " * 512 + b"\r\n",
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                answer = await asyncio.wait_for(reader.read(), 5)
                assert answer.startswith(b"HTTP/1.1 413") and b"body_too_large" in answer
                writer.close()

    asyncio.run(go())
    exact = json.dumps(body()).encode().ljust(1000)
    assert post(exact, max_body_bytes=1000).status_code == 200
    problem(post(exact + b" ", max_body_bytes=1000), 413)


def test_ten_megabytes_of_prompt_are_refused_fast() -> None:
    started = time.process_time()
    error = problem(post({"model": MODEL, "messages": [{"role": "user", "content": "word " * 2_000_000}]}), 400)
    assert error["code"] == "context_length_exceeded"
    assert time.process_time() - started < 2


def test_a_big_image_is_read_off_the_event_loop() -> None:
    replicas = FakeReplicas()
    assert post(body(image_part(uri(picture("BMP", (1000, 1000))))), replicas).status_code == 200
    assert len(replicas.asked[0].messages[0].parts[0]) > 3_000_000  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(kind: str) -> None:
    async def ask() -> httpx.Response:
        async with client_of(FakeReplicas()) as client:
            response: httpx.Response = await client.post(PATH, content=b"{}", headers={"content-type": kind})
            return response

    assert "application/json" in problem(asyncio.run(ask()), 415)["message"]


def test_a_body_that_trickles_in_is_given_up() -> None:
    async def go() -> None:
        async with served(FakeReplicas(), timeout_s=0.2) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head("Content-Length: 100") + b"{")
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 408")
            writer.close()

    asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_the_surplus_is_turned_away_and_places_come_back(stream: bool) -> None:
    async def go() -> None:
        replicas = FakeReplicas(seconds=0.2)
        async with client_of(replicas, max_in_flight=2, retry_after_s=7) as client:
            asking = [client.post(PATH, json=body(stream=stream)) for _ in range(6)]
            found = await asyncio.gather(*asking)
            refused = [response for response in found if response.status_code != 200]
            assert len(refused) == 4 and len(replicas.asked) == 2
            assert {response.headers["retry-after"] for response in refused} == {"7"}
            assert problem(refused[0], 429)["type"] == "rate_limit_error"
            # Looking is not working: a full endpoint still lists its models.
            assert (await client.get("/v1/models")).status_code == 200
            assert (await client.post(PATH, json=body(stream=stream))).status_code == 200
            # Bad requests give their places back too.
            for _ in range(4):
                problem(await client.post(PATH, json=body(seed="x")), 400)
            assert (await client.post(PATH, json=body())).status_code == 200

    asyncio.run(go())


def test_a_refusal_comes_before_the_body() -> None:
    async def go() -> None:
        async with served(FakeReplicas(), max_in_flight=0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head("Content-Length: 1000000"))
            assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 429")
            writer.close()

    asyncio.run(go())


def test_what_takes_too_long_is_cancelled() -> None:
    replicas = FakeReplicas(seconds=30)
    assert problem(post(body(), replicas, timeout_s=0.1), 504)["code"] == "deadline"
    assert replicas.cancelled == 1 and replicas.asked[0].timeout_s == 0.1
    assert problem(post(body(stream=True), replicas, timeout_s=0.1), 504)["code"] == "deadline"
    assert replicas.closed == 1
    slow = FakeReplicas(seconds=0.1, pieces=100)
    last = post(body(stream=True), slow, timeout_s=0.35).text.split("\n\n")[-2]
    assert "deadline" in last and slow.closed == 1


def test_many_at_once_are_all_answered() -> None:
    async def go() -> None:
        replicas = FakeReplicas()
        async with client_of(replicas, max_in_flight=200) as client:
            found = await asyncio.gather(
                *(client.post(PATH, json=body(image_part(uri(picture())))) for _ in range(200))
            )
        assert {response.status_code for response in found} == {200}
        assert len({response.json()["id"] for response in found}) == 200

    asyncio.run(go())
