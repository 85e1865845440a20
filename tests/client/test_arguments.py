"""The client checks arguments before it sends a request, and warns about coroutines that are never awaited."""

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import regd_client
from regd_client import BadArgument, Client, blocking
from regd_client.errors import RegdError

NOWHERE = "127.0.0.1:1"  # a request to it would fail with another error
NAN = float("nan")

untyped: Any = regd_client  # calls that a type checker would reject
CALLS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("wait", "-1", lambda client: client.resolve("a", wait=-1)),
    ("wait", "'5'", lambda client: client.resolve("a", wait="5")),
    ("wait", "nan", lambda client: client.resolve("a", wait=NAN)),
    ("wait", "inf", lambda client: client.resolve("a", wait=float("inf"))),
    ("wait", "True", lambda client: client.resolve("a", wait=True)),
    ("wait", "3601", lambda client: client.resolve("a", wait=3_601)),
    ("name", "5", lambda client: client.resolve(5)),
    ("name", "None", lambda client: client.resolve(None)),
    ("instance", "1", lambda client: client.resolve("a", instance=1)),
    ("meta", "'v' must be a string, not 1", lambda client: client.resolve("a", meta={"v": 1})),
    ("meta", "the keys of meta must be strings, not 1", lambda client: client.resolve("a", meta={1: "v"})),
    ("meta", "meta must be a mapping of strings to strings, not 5", lambda client: client.resolve("a", meta=5)),
    ("meta", "'v' must be a string, not 1", lambda client: client.resolve_all("a", meta={"v": 1})),
    ("name", "b'a'", lambda client: client.resolve_all(b"a")),
    ("pattern", "None", lambda client: client.instances(None)),
    ("pattern", "5", lambda client: anext(client.watch(5))),
    ("meta", "'v' must be a string, not 1", lambda client: anext(client.watch(meta={"v": 1}))),
    ("stale_s_max", "'1'", lambda client: client.mirror("a", stale_s_max="1").__aenter__()),
    ("name", "5", lambda client: client.register(5, 1)),
    ("port", "'80'", lambda client: client.register("a", "80")),
    ("port", "True", lambda client: client.register("a", True)),
    ("port", "80.0", lambda client: client.register("a", 80.0)),
    ("host", "5", lambda client: client.register("a", 1, host=5)),
    ("state", "5", lambda client: client.register("a", 1, state=5)),
    ("priority", "'1'", lambda client: client.register("a", 1, priority="1")),
    ("priority", "True", lambda client: client.register("a", 1, priority=True)),
    ("priority", "1.0", lambda client: client.update("a", priority=1.0)),
    ("static", "'no'", lambda client: client.register("a", 1, static="no")),
    ("force", "1", lambda client: client.register("a", 1, force=1)),
    ("pid", "'1'", lambda client: client.register("a", 1, pid="1")),
    ("meta", "'v' must be a string, not None", lambda client: client.register("a", 1, meta={"v": None})),
    ("name", "5", lambda client: client.deregister(5)),
    ("meta", "'v' must be a string, not 1", lambda client: client.update("a", {"v": 1})),
    ("state", "True", lambda client: client.update("a", state=True)),
    ("name", "5", lambda client: client.why(5)),
    ("port", "'x'", lambda client: untyped.listen("a", "x")),
    ("drain_s", "-1", lambda client: regd_client.listen("a", drain_s=-1)),
    ("meta", "'v' must be a string, not 1", lambda client: untyped.listen("a", meta={"v": 1})),
    ("address", "5", lambda client: untyped.Client(5)),
    ("connect_timeout_s", "'1'", lambda client: untyped.Client(connect_timeout_s="1")),
]  # fmt: skip
VERBS: list[Callable[[Client, Any], Any]] = [
    lambda client, timeout: client.ping(timeout=timeout),
    lambda client, timeout: client.hello(timeout=timeout),
    lambda client, timeout: client.stats(timeout=timeout),
    lambda client, timeout: client.why("a", timeout=timeout),
    lambda client, timeout: client.resolve("a", timeout=timeout),
    lambda client, timeout: client.resolve("a", wait=1, timeout=timeout),
    lambda client, timeout: client.resolve_all("a", timeout=timeout),
    lambda client, timeout: client.instances(timeout=timeout),
    lambda client, timeout: client.register("a", 1, timeout=timeout),
    lambda client, timeout: client.deregister("a", timeout=timeout),
    lambda client, timeout: client.update("a", {}, timeout=timeout),
    lambda client, timeout: anext(client.watch(timeout=timeout)),
    lambda client, timeout: client.mirror(timeout=timeout).__aenter__(),
    lambda client, timeout: regd_client.listen("a", timeout=timeout),
]


@pytest.mark.parametrize(("field", "said", "call"), CALLS)
async def test_invalid_argument_raises_before_anything_is_sent(
    field: str, said: str, call: Callable[[Client], Any]
) -> None:
    with pytest.raises(BadArgument) as raised:
        await call(Client(NOWHERE))
    assert raised.value.details == {"field": field}
    assert str(raised.value).endswith(said if " " in said else f"not {said}")


@pytest.mark.parametrize("timeout", [-1, "5", NAN, True, [1]])
@pytest.mark.parametrize("verb", VERBS)
async def test_invalid_timeout_raises_before_anything_is_sent(
    verb: Callable[[Client, Any], Any], timeout: object
) -> None:
    with pytest.raises(BadArgument, match="timeout must be 0 to 86400 seconds, not"):
        await verb(Client(NOWHERE), timeout)


@pytest.mark.parametrize("verb", VERBS)
def test_call_outside_asyncio_raises(verb: Callable[[Client, Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens under trio, where another event loop runs the coroutine."""
    monkeypatch.setenv("REGD_ADDRESS", NOWHERE)
    for timeout in (None, 1):
        awaited = verb(Client(NOWHERE), timeout).__await__()
        with pytest.raises(RegdError, match="regd_client needs asyncio, and no asyncio event loop runs here"):
            next(awaited)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: regd_client.register("web", 1), r"register\('web'\) was never awaited"),
        (lambda: Client(NOWHERE).register("web", 1), r"register\('web'\) was never awaited"),
        (lambda: regd_client.listen("web"), r"listen\('web'\) was never awaited"),
    ],
)
def test_coroutine_that_is_never_awaited_warns(call: Callable[[], object], said: str) -> None:
    with pytest.warns(RuntimeWarning, match=said) as warned:
        call()
    assert warned[0].filename == __file__


async def test_awaited_coroutine_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", NOWHERE)
    ways: list[Callable[[Any], Awaitable[object]]] = [
        lambda made: made,
        lambda made: made.__aenter__(),
        asyncio.ensure_future,
    ]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for way in ways:
            makes: list[Callable[[], Any]] = [
                lambda: regd_client.register("web", 1, timeout=0.01),
                lambda: Client(NOWHERE).register("web", 1, timeout=0.01),
            ]
            for make in makes:
                with pytest.raises(regd_client.Unavailable):
                    await way(make())
        regd_client.register("web", 1).close()
        gc.collect()
    assert not [warning for warning in warned if warning.category is RuntimeWarning]


def test_invalid_argument_of_a_blocking_verb_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", NOWHERE)
    verbs: Any = blocking
    calls: list[Callable[[], object]] = [
        lambda: verbs.resolve("a", wait=-1),
        lambda: verbs.resolve("a", timeout="5"),
        lambda: verbs.register("a", "1"),
        lambda: verbs.listen("a", meta={"v": 1}),
        lambda: verbs.deregister(5),
        lambda: verbs.Client(NOWHERE).update("a", state=5),
    ]
    for call in calls:
        with pytest.raises(BadArgument):
            call()
