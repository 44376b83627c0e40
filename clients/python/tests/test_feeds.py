"""The queue of a reader is bounded, and the reader or the log is told of dropped messages."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from conftest import within
from wsproxy import Gap, UpstreamMessage
from wsproxy._feeds import SUBSCRIBED, Consumer, Item, Subscription

OVERFLOW = Gap(0.0, "overflow")


def consumer(entries_max: int = 10, bytes_max: int = 100) -> Consumer:
    return Consumer(lambda _: None, "session:s-1:up", entries_max=entries_max, bytes_max=bytes_max)


def message(number: int, size: int = 2) -> UpstreamMessage:
    return UpstreamMessage(f"{number:0{size}}".encode())


def test_the_oldest_make_room_in_number_and_in_bytes() -> None:
    for size, bytes_max, left in ((2, 1000, range(41, 50)), (30, 100, range(47, 50))):
        queue = consumer(bytes_max=bytes_max)
        for number in range(50):
            queue.push(message(number, size))
        assert queue.drain() == [OVERFLOW, *(message(number, size) for number in left)]
        # It begins anew.
        queue.push(message(1, size))
        assert queue.drain() == [message(1, size)]


def test_a_message_that_is_larger_than_all_room_is_kept_alone() -> None:
    queue = consumer()
    queue.push(message(1, 1000))
    assert queue.drain() == [message(1, 1000)]
    for number in range(3):
        queue.push(message(number, 1000))
    assert queue.drain() == [OVERFLOW, message(2, 1000)]


def test_gaps_and_confirmations_outlive_an_overflow() -> None:
    queue = consumer()
    queue.confirm(None)
    queue.confirm(2.0)
    queue.push(message(1, 1000))
    # Nothing was dropped, so the gap is the one that there was.
    assert queue.drain() == [Gap(2.0, "connection"), SUBSCRIBED, message(1, 1000)]
    queue.confirm(None)
    for number in range(3):
        queue.push(message(number, 80))
    assert queue.drain() == [OVERFLOW, SUBSCRIBED, message(2, 80)]


def test_what_grows_without_messages_is_bounded_too() -> None:
    queue = consumer()
    for _ in range(100):
        queue.confirm(1.0)
    assert len(queue.drain()) <= 10


@pytest.mark.asyncio
async def test_one_gap_is_told_between_two_messages() -> None:
    queue = consumer()
    got: list[Item] = []
    for number in range(100):
        queue.push(message(number, 30))
        if number % 20 == 10:
            got += [await queue.next() for _ in range(2)]
        elif number % 20 == 5 and number > 20:
            # The reader was told, and more is dropped before it comes back.
            got.append(await queue.next())
    are_gaps = [isinstance(item, Gap) for item in got]
    assert any(are_gaps)
    assert not any(first and second for first, second in itertools.pairwise(are_gaps))


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.asyncio
async def test_a_loss_of_which_nobody_is_told_is_logged_once(is_told: bool, caplog: pytest.LogCaptureFixture) -> None:
    queue, gaps = consumer(), list[Gap]()
    messages = Subscription(lambda: queue, lambda each: each, gaps.append if is_told else None)
    queue.confirm(None)
    async with messages:
        for number in range(50):
            queue.push(message(number))
        assert await anext(messages) == message(42)
    lines = ["session:s-1:up: the reader is too slow, the oldest messages are dropped (2 so far)."]
    assert (gaps, caplog.messages) == (([OVERFLOW], []) if is_told else ([], lines))


async def nothing() -> list[UpstreamMessage | Gap]:
    return []


async def wait_for_next(queue: Consumer) -> tuple[Subscription[UpstreamMessage], asyncio.Task[UpstreamMessage]]:
    """A subscription over a log in which nothing new stands, and a task that waits for its next message."""
    messages = Subscription(lambda: queue, lambda each: each, None, log=nothing)
    queue.confirm(None)
    task = asyncio.ensure_future(anext(messages))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    return messages, task


@pytest.mark.asyncio
async def test_a_reader_ends_that_is_cancelled_while_a_message_comes() -> None:
    # At each of the loop's turns between the message and the reader's next wait.
    for turns in range(10):
        queue = consumer()
        _, task = await wait_for_next(queue)
        queue.push(message(1))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task, 2.0)


@pytest.mark.asyncio
async def test_a_subscription_that_is_given_up_ends_the_wait_for_its_next_message() -> None:
    messages, task = await wait_for_next(consumer())
    await messages.aclose()
    with pytest.raises(StopAsyncIteration):
        await within(task, 2.0)
