"""The same history at the fake and at a daemon, request by request: they say the same, and tell watchers the same."""

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regd_client.client import Client
from tests.support.daemon import WAIT_S
from tests.support.registries import Registry, fake, outcome, plain, real

pytestmark = pytest.mark.socket

NAMES = ("web", "webb", "db", "db.main")  # two of them near each other
ZONE = {"zone": "a"}
WATCHES: tuple[dict[str, Any], ...] = ({}, {"name": "web*", "meta": ZONE}, {"name": "db"})


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return requests that have the `name` and any of the others."""
    name = fields.pop("name", st.sampled_from(NAMES))
    return st.fixed_dictionaries({"name": name}, optional=fields)


INSTANCE = st.sampled_from(("", "1", "b"))
META = st.sampled_from(({}, ZONE, {"zone": "b"}, {"zone": "a", "k": "ü\n"}))
STATE = st.sampled_from(("starting", "ready", "ready", "draining"))
REV = st.integers(0, 12)
FLAG = st.booleans()
REGISTER = st.builds(
    lambda fields, port: {"port": port, **fields},
    some(
        instance=INSTANCE,
        meta=META,
        state=STATE,
        hold=FLAG,
        pid=st.just(os.getpid()),
        ttl=st.sampled_from((10, 2.5)),
        force=FLAG,
        **{"if": st.just(0)},
    ),
    st.integers(1, 2),
)
PATTERN = st.sampled_from((*NAMES, "*", "web*", "d*", "x*"))
REQUESTS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "register": REGISTER,
    "deregister": some(instance=INSTANCE, **{"if": REV}),
    "update": some(instance=INSTANCE, meta=META, state=STATE, **{"if": REV}),
    "resolve": some(instance=INSTANCE, meta=META, all=FLAG),
    "list": some(
        name=PATTERN, meta=META, limit=st.integers(1, 3), after=st.sampled_from(("db", "db/1", "web/b", "zz"))
    ),
    "renew": some(instance=INSTANCE, ttl=st.sampled_from((5, 1.5))),
    "why": some(instance=INSTANCE),
}
ASKED = st.one_of(
    [st.tuples(st.just(cmd), st.integers(0, 2), arguments) for cmd, arguments in REQUESTS.items()]
    + [st.tuples(st.just(cmd), st.integers(0, 2), REQUESTS[cmd]) for cmd in ("register", "register", "update")]
)
SHARED = st.sampled_from(  # what several hold, and one withdraws from
    (("register", {"name": "web", "port": 1, "hold": True}), ("update", {"name": "web", "state": "draining"}))
).flatmap(lambda asked: st.tuples(st.just(asked[0]), st.integers(0, 2), st.just(asked[1])))
DONE: st.SearchStrategy[tuple[str, int, dict[str, Any]]] = st.tuples(
    st.sampled_from(("close", "close", "restart")), st.integers(0, 2), st.just({})
)
HISTORY = st.lists(st.one_of(ASKED, ASKED, ASKED, SHARED, DONE), min_size=10, max_size=40)


class Side:
    """Four clients of one of the two, and what they are told. The last of them asks for nothing that it holds."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.clients: list[Client] = []
        self.told: list[list[dict[str, Any]]] = []  # by watch
        self.lost: list[list[dict[str, Any]]] = []  # by client
        self._ends = 0

    async def begin(self) -> None:
        self.clients = [self.registry.client() for _ in range(4)]
        self.told = [[] for _ in WATCHES]
        self.lost = [[] for _ in self.clients]
        for who in range(4):
            await self._connect(who)
        connection = await self.clients[3]._connected()
        for told, arguments in zip(self.told, WATCHES, strict=True):
            await connection.ask("watch", arguments, told.append)

    async def _connect(self, who: int) -> None:
        lost = self.lost[who]
        self.clients[who]._link.lost = lambda connection, event: lost.append(event)
        await self.clients[who].ping()

    async def do(self, cmd: str, who: int, arguments: dict[str, Any]) -> Any:
        if cmd == "restart":
            await self.end()
            async with self.registry.away():
                pass
            await self.begin()
        elif cmd == "close":
            await self.clients[who].ping()  # what it was told is here
            await self.clients[who].close()
            self.clients[who] = self.registry.client()
            await self._connect(who)
        else:
            return await outcome(self.clients[who], cmd, **arguments)
        return None

    async def known(self) -> list[Any]:
        """Return all that may be asked about what there is."""
        asked = [await outcome(self.clients[3], "list")]
        return asked + [await outcome(self.clients[3], "why", name=name) for name in NAMES]

    async def events(self) -> Any:
        """Return what was told, once all is told."""
        self._ends += 1
        end = {"instance": "end", "port": 10 + self._ends}  # another each time, or it would be no change
        await outcome(self.clients[3], "register", name="web", meta=ZONE, **end)
        await outcome(self.clients[3], "register", name="db", **end)
        async with asyncio.timeout(WAIT_S):
            for told in self.told:
                while not end.items() <= told[-1].items():
                    await asyncio.sleep(0)
        for client in self.clients:
            await client.ping()
        return plain([[each for each in told if "event" in each] for told in (*self.told, *self.lost)])

    async def end(self) -> None:
        for client in self.clients:
            await client.close()


async def alike(one: Side, other: Side) -> None:
    """Wait until a daemon has seen what ended, as the fake has at once; then the two know the same."""
    late = time.monotonic() + WAIT_S
    while (ours := await one.known()) != (theirs := await other.known()) and time.monotonic() < late:
        await asyncio.sleep(0)
    assert ours == theirs, f"{ours}\n{theirs}"


async def live(history: list[tuple[str, int, dict[str, Any]]], folder: Path) -> None:
    async with fake() as imitation, real(folder) as daemon:
        sides = [Side(imitation), Side(daemon)]
        for side in sides:
            await side.begin()
        for cmd, who, arguments in history:
            if cmd == "restart":
                assert await sides[0].events() == await sides[1].events()
            ours, theirs = [await side.do(cmd, who, dict(arguments)) for side in sides]
            assert ours == theirs, f"{cmd} {arguments}\n{ours}\n{theirs}"
            if cmd in ("close", "restart"):
                await alike(*sides)
        await alike(*sides)
        assert await sides[0].events() == await sides[1].events()
        for side in sides:
            await side.end()


@pytest.mark.timeout(300)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(HISTORY)
def test_any_history_goes_alike(history: list[tuple[str, int, dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(history, Path(folder)), debug=True)
