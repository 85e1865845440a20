"""Calls at members that follow a script: what is repeated, how long a call waits, and tokens."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from regd.bridge.etcd import member
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import DeadlineExceeded, EtcdError, EtcdRefused, EtcdUnavailable
from regd.bridge.etcd.member import Member, Metadata
from regd.bridge.etcd.model import User
from tests.bridge.etcd.conftest import PATIENT_S
from tests.support.etcd import reserved_port
from tests.support.polling import until
from tests.support.scripted_etcd import ScriptedEtcd

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "the member is shutting down")
NO_LEADER = (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")


@pytest.fixture
def user(tmp_path: Path) -> User:
    file = tmp_path / "password"
    file.write_text("secret\n")
    return User("a", file)


async def test_read_is_repeated() -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address]) as etcd:
        script.failures = [UNAVAILABLE, NO_LEADER, UNAVAILABLE]
        await etcd.read(b"/")
    assert len(script.deadlines_s) == 4


async def test_write_that_may_have_had_an_effect_is_not_repeated() -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address]) as etcd:
        script.failures = [UNAVAILABLE]
        with pytest.raises(EtcdUnavailable, match="shutting down") as caught:
            await etcd.put(b"/", b"")
    assert caught.value.may_have_effect
    assert len(script.deadlines_s) == 1


async def test_write_that_a_member_without_a_leader_refuses_is_repeated() -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address]) as etcd:
        script.failures = [NO_LEADER, NO_LEADER]
        await etcd.put(b"/", b"")
    assert len(script.deadlines_s) == 3


async def test_calls_go_to_the_next_member_and_stay_there() -> None:
    async with (
        ScriptedEtcd().serve() as first,
        ScriptedEtcd().serve() as second,
        Etcd([first.address, second.address]) as etcd,
    ):
        first.failures = [UNAVAILABLE]
        for _ in range(3):
            await etcd.read(b"/")
        assert etcd.member == second.address
    assert (len(first.deadlines_s), len(second.deadlines_s)) == (1, 3)


async def test_deadline_grows_while_a_cluster_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines_s: list[float] = []
    ask = Member.ask

    async def slow(self: Member, method: Any, request: Any, metadata: Metadata, timeout_s: float) -> Any:
        deadlines_s.append(timeout_s)
        if len(deadlines_s) in (1, 2, 4):
            raise DeadlineExceeded("slow")
        return await ask(self, method, request, metadata, PATIENT_S)

    monkeypatch.setattr(Member, "ask", slow)
    async with ScriptedEtcd().serve() as script, Etcd([script.address], deadline_s=2) as etcd:
        await etcd.read(b"/")
        await etcd.read(b"/")
    assert deadlines_s == [2, 4, 8, 2, 4]


async def test_member_that_does_not_answer_in_time() -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], deadline_s=0.1) as etcd:
        script.failures = [None]
        with pytest.raises(DeadlineExceeded, match=f"etcd at {script.address} did not answer in time"):
            await etcd.put(b"/", b"")


async def test_calls_share_a_token(user: User) -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], user=user, deadline_s=PATIENT_S) as etcd:
        for number in (1, 2):
            await asyncio.gather(*(etcd.read(b"/") for _ in range(20)))
            assert len(script.passwords) == number
            script.expired.add(f"token {number}")
        script.expired.add("token 3")
        with pytest.raises(EtcdRefused, match="invalid auth token"):
            await etcd.read(b"/")
        assert len(script.passwords) == 3


@pytest.mark.parametrize(
    "failure",
    [
        (grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token"),
        (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: revision of auth store is old"),
        (grpc.StatusCode.UNKNOWN, "auth: revision in header is old"),  # etcd 3.5.1
    ],
)
async def test_token_that_is_too_old(failure: tuple[grpc.StatusCode, str], user: User) -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], user=user, deadline_s=PATIENT_S) as etcd:
        await etcd.read(b"/")
        script.failures = [failure]
        await etcd.put(b"/", b"")
    assert script.passwords == ["secret", "secret"]


async def test_password_file_is_read_at_every_authentication(user: User) -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], user=user, deadline_s=PATIENT_S) as etcd:
        for text in ("first", "second \r\nanother line\n"):
            user.password_file.write_text(text)
            await etcd.put(b"/", b"")
            script.expired.add(f"token {len(script.passwords)}")
        user.password_file.unlink()
        with pytest.raises(EtcdRefused, match=f"cannot read {user.password_file}: No such file"):
            await etcd.put(b"/", b"")
        user.password_file.write_bytes(b"\xff")
        with pytest.raises(EtcdRefused, match=f"cannot read {user.password_file}: it is not text"):
            await etcd.put(b"/", b"")
    assert script.passwords == ["first", "second "]


async def test_why_a_member_is_not_reached() -> None:
    with reserved_port() as sock:
        port = sock.getsockname()[1]
        expected = {
            f"127.0.0.1:{port}": "Failed to connect to remote host: Connection refused",
            f"no-such-host.invalid:{port}": "errors resolving no-such-host.invalid",
        }
        for address, reason in expected.items():
            async with Etcd([address]) as etcd:
                etcd._calls.repeat_s = 0.0
                with pytest.raises(EtcdUnavailable) as caught:
                    await etcd.put(b"/", b"")
            assert str(caught.value).startswith(f"cannot connect to etcd at {address}: {reason}")
            assert not caught.value.may_have_effect


async def test_member_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(member, "CONNECT_S", 0.2)
        async with ScriptedEtcd().serve() as script, Etcd([address, script.address]) as etcd:
            await etcd.put(b"/", b"")
            assert etcd.member == script.address
        async with Etcd([address]) as etcd:
            reading = asyncio.create_task(etcd.read(b"/"))
            await until(lambda: etcd._members._open)
        await asyncio.wait([reading], timeout=PATIENT_S)
        assert isinstance(reading.exception(), EtcdError)
