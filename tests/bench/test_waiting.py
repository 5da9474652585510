"""Replicas that only wait, and the time over which the scale bench counts them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from shortv.bench.scale import steady
from shortv.bench.waiting import BATCH, Span, WaitingReplica, spans_in
from shortv.request import FULL_MODEL, Completion, Message, Request, Work

GUARD_S = 60.0


def test_calls_share_batches_and_every_plan_has_its_result(tmp_path: Path) -> None:
    request = Request(request_id="r", messages=(Message(role="user", parts=("?",)),))
    works = [Work(request=request, plans=(FULL_MODEL, "p"))] * 4

    async def complete() -> None:
        replica = WaitingReplica(replicas=1, seconds=0.01, digests={"p": "d"}, trace=str(tmp_path))
        async with asyncio.timeout(GUARD_S):
            replies = await asyncio.gather(*(replica.complete_all(works) for _ in range(8)))
        results = [found for reply in replies for found in reply.results]
        assert len(results) == 32 and all(set(found) == {FULL_MODEL, "p"} for found in results)
        digests = {one.plan_digest for found in results for one in found.values() if isinstance(one, Completion)}
        assert digests == {None, "d"}

    asyncio.run(complete())
    spans = list(spans_in(tmp_path))
    # 32 documents in calls of 4 fill two batches; each lasts for both plans.
    assert [span.documents for span in spans] == [BATCH, BATCH]
    assert all(span.ended - span.began >= 0.02 for span in spans)


def test_documents_count_from_the_last_first_batch_until_enough_are_done() -> None:
    spans = [Span("a", 0, 2, 10), Span("b", 1, 3, 10), Span("a", 2, 4, 10), Span("b", 3, 5, 10)]
    begin, end = steady(spans, sent=25)
    assert (begin, end) == (1, 4)
    assert sum(span.documents_within(begin, end) for span in spans) == 5 + 10 + 10 + 5
