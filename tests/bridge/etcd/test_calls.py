"""Calls to members with scripted answers: what is repeated, deadlines, addresses and tokens."""

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
from regd.bridge.etcd.model import Tls, User
from tests.bridge.etcd.conftest import PATIENT_S
from tests.support.certificates import Authority
from tests.support.etcd import reserved_port
from tests.support.polling import until
from tests.support.scripted_etcd import Failure, ScriptedEtcd

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "the member is shutting down")
NO_LEADER = (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")
INVALID_TOKEN = (grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token")


@pytest.fixture
def user(tmp_path: Path) -> User:
    file = tmp_path / "password"
    file.write_text("secret\n")
    return User("a", file)


async def test_read_is_repeated() -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], deadline_s=PATIENT_S) as etcd:
        script.failures = [UNAVAILABLE, NO_LEADER, UNAVAILABLE]
        await etcd.read(b"/")
    assert len(script.deadlines_s) == 4


async def test_write_that_may_have_had_an_effect_is_not_repeated() -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], deadline_s=PATIENT_S) as etcd:
        script.failures = [UNAVAILABLE]
        with pytest.raises(EtcdUnavailable, match="shutting down") as caught:
            await etcd.put(b"/", b"")
    assert caught.value.may_have_effect
    assert len(script.deadlines_s) == 1


async def test_write_refused_by_a_member_without_a_leader_is_repeated() -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], deadline_s=PATIENT_S) as etcd:
        script.failures = [NO_LEADER, NO_LEADER]
        await etcd.put(b"/", b"")
    assert len(script.deadlines_s) == 3


async def test_client_moves_to_the_next_member_and_stays_there() -> None:
    async with (
        ScriptedEtcd().serve() as first,
        ScriptedEtcd().serve() as second,
        Etcd([first.address, second.address], deadline_s=PATIENT_S) as etcd,
    ):
        first.failures = [UNAVAILABLE]
        for _ in range(3):
            await etcd.read(b"/")
        assert etcd.member == second.address
    assert (len(first.deadlines_s), len(second.deadlines_s)) == (1, 3)


@pytest.mark.parametrize(
    "failure",
    [
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!"),
        (grpc.StatusCode.UNIMPLEMENTED, "Received http2 header with status: 404"),
        (grpc.StatusCode.PERMISSION_DENIED, "Received http2 header with status: 403"),
        (grpc.StatusCode.UNAUTHENTICATED, "Received http2 header with status: 401"),
    ],
)
async def test_client_moves_on_from_a_server_that_is_not_etcd(failure: Failure) -> None:
    async with (
        ScriptedEtcd().serve() as other,
        ScriptedEtcd().serve() as script,
        Etcd([other.address, script.address]) as etcd,
    ):
        other.failures = [failure]
        await etcd.read(b"/")
        assert etcd.member == script.address
    async with ScriptedEtcd().serve() as other, Etcd([other.address]) as etcd:
        etcd._calls.repeat_s = 0.0
        other.failures = [failure]
        with pytest.raises(EtcdUnavailable, match=f"no etcd at {other.address}: {failure[1]}"):
            await etcd.read(b"/")


async def test_write_refused_for_lack_of_space_does_not_move_the_client() -> None:
    no_space = (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded")
    async with (
        ScriptedEtcd().serve() as script,
        Etcd([script.address, "127.0.0.1:1"], deadline_s=PATIENT_S) as etcd,
    ):
        script.failures = [no_space]
        with pytest.raises(EtcdRefused, match="database space exceeded"):
            await etcd.put(b"/", b"")
        assert etcd.member == script.address


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


async def test_call_that_exceeds_its_deadline() -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], deadline_s=0.1) as etcd:
        script.failures = [None]
        with pytest.raises(DeadlineExceeded, match=f"etcd at {script.address} did not answer in time"):
            await etcd.put(b"/", b"")


# Connecting.


async def test_reason_of_a_failed_connection() -> None:
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


async def test_member_that_accepts_a_connection_and_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_calls_that_wait_for_a_connection_share_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each call would try all members again, one call after another."""
    connect = Member.connect
    attempts: list[str] = []

    async def counted(self: Member) -> None:
        attempts.append(self.address)
        await connect(self)

    monkeypatch.setattr(Member, "connect", counted)
    with reserved_port() as first, reserved_port() as second:
        addresses = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in (first, second)]
        async with Etcd(addresses) as etcd:
            etcd._calls.repeat_s = 0.0
            errors = await asyncio.gather(*(etcd.put(b"/", b"") for _ in range(20)), return_exceptions=True)
    assert attempts == addresses
    for error in errors:
        assert isinstance(error, EtcdUnavailable)
        assert not error.may_have_effect


@pytest.mark.parametrize("uses_tls", [False, True])
async def test_ipv6_address(uses_tls: bool, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    own = Authority(tmp_path / "authority").issue("server", "IP:::1") if uses_tls else None
    tls = None if own is None else Tls(own.cacert)
    async with (
        ScriptedEtcd().serve("[::1]", own) as script,
        Etcd([script.address], tls, deadline_s=PATIENT_S) as etcd,
    ):
        await etcd.put(b"/", b"")


# Tokens.


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


async def test_user_without_a_password_is_refused(user: User) -> None:
    no_password = "auth: authentication failed, password was given for no password user"
    async with ScriptedEtcd().serve() as script, Etcd([script.address], user=user, deadline_s=PATIENT_S) as etcd:
        script.failures = [(grpc.StatusCode.UNKNOWN, no_password)]
        with pytest.raises(EtcdRefused, match="password was given"):
            await etcd.put(b"/", b"")


@pytest.mark.parametrize(
    "failure",
    [
        INVALID_TOKEN,
        (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: revision of auth store is old"),
        (grpc.StatusCode.UNKNOWN, "auth: revision in header is old"),  # etcd 3.5.1
    ],
)
async def test_outdated_token_is_replaced(failure: Failure, user: User) -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], user=user, deadline_s=PATIENT_S) as etcd:
        await etcd.read(b"/")
        script.failures = [failure]
        await etcd.put(b"/", b"")
    assert script.passwords == ["secret", "secret"]


async def test_client_authenticates_once_if_authentication_is_disabled(user: User) -> None:
    disabled = (grpc.StatusCode.FAILED_PRECONDITION, "etcdserver: authentication is not enabled")
    enabled_meanwhile = (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty")
    async with ScriptedEtcd().serve() as script, Etcd([script.address], user=user, deadline_s=PATIENT_S) as etcd:
        script.authentication_failures = [disabled]
        for _ in range(3):
            await etcd.put(b"/", b"")
        assert len(script.passwords) == 1
        script.failures = [enabled_meanwhile]
        await etcd.put(b"/", b"")
        assert len(script.passwords) == 2


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


async def test_write_whose_authentication_failed_is_repeated(user: User) -> None:
    async with ScriptedEtcd().serve() as script, Etcd([script.address], user=user, deadline_s=PATIENT_S) as etcd:
        script.authentication_failures = [UNAVAILABLE]
        await etcd.put(b"/", b"")
    assert (len(script.passwords), len(script.deadlines_s)) == (2, 1)


async def test_calls_do_not_authenticate_at_a_member_that_was_given_up(user: User) -> None:
    """Otherwise the calls that wait for a token would wait for its deadline, one call after another."""
    async with ScriptedEtcd().serve() as script, Etcd([script.address], user=user, deadline_s=0.2) as etcd:
        etcd._calls.repeat_s = 0.0
        script.authentication_failures = [None] * 10
        results = await asyncio.gather(*(etcd.read(b"/") for _ in range(10)), return_exceptions=True)
    assert {type(result) for result in results} <= {DeadlineExceeded, EtcdUnavailable}
    assert len(script.passwords) <= 1


async def test_authentication_at_a_frozen_member_does_not_delay_others(user: User) -> None:
    async with (
        ScriptedEtcd().serve() as frozen,
        ScriptedEtcd().serve() as healthy,
        Etcd([frozen.address, healthy.address], user=user, deadline_s=1_000) as etcd,
    ):
        frozen.authentication_failures = [None]
        reading = asyncio.create_task(etcd.read(b"/"))
        await until(lambda: frozen.passwords)
        with pytest.raises(EtcdUnavailable):
            async with etcd._members.use():
                raise EtcdUnavailable("another call has failed here")
        async with asyncio.timeout(PATIENT_S):
            await etcd.read(b"/")
        assert etcd.member == healthy.address
        reading.cancel()
        await asyncio.wait([reading])
