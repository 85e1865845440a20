"""TLS with client certificates, users and roles, tokens, with a real etcd."""

import asyncio
import json
import subprocess
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import EtcdRefused, EtcdUnavailable
from regd.bridge.etcd.model import Tls, User
from tests.bridge.etcd.conftest import PATIENT_S
from tests.support.certificates import Authority
from tests.support.etcd import EtcdCluster, cluster, need
from tests.support.followers import following
from tests.support.polling import until
from tests.support.scripted_etcd import ScriptedEtcd

PASSWORDS = {"root": "root-secret", "machine-a": "secret-of-a", "reader": "secret-of-readers"}


# TLS.


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def tls_server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    own = authority.issue("server")
    options = (
        "--client-cert-auth", "--trusted-ca-file", str(own.cacert), "--cert-file", str(own.cert), "--key-file", str(own.key)
    )  # fmt: skip
    with cluster(tmp_path_factory.mktemp("etcd"), options=options, scheme="https") as running:
        yield running


async def test_client_certificate(tls_server: EtcdCluster, authority: Authority, prefix: bytes) -> None:
    tls = authority.issue("client")
    async with Etcd(tls_server.addresses, tls, deadline_s=PATIENT_S) as etcd, etcd.lease(10) as lease:
        revision = await etcd.put(prefix, b"", lease.id)
        async with following(etcd, prefix, revision) as follower:
            await follower.until_revision(await etcd.delete(prefix))


async def refusal(etcd: Etcd) -> str:
    """Return the reason of a failed connection."""
    etcd._calls.repeat_s = 0.0
    with pytest.raises(EtcdUnavailable) as caught:
        async with etcd:
            await etcd.put(b"/", b"")
    assert not caught.value.may_have_effect
    return str(caught.value)


async def test_refused_tls_connections(tls_server: EtcdCluster, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger")
    ours = authority.issue("client")
    assert "CERTIFICATE_VERIFY_FAILED" in await refusal(Etcd(tls_server.addresses, Tls(stranger.cert)))
    for tls in (None, Tls(authority.cert), Tls(authority.cert, *stranger.issue("client")[1:])):
        assert "cannot connect to etcd at 127.0.0.1:" in await refusal(Etcd(tls_server.addresses, tls))
    missing = tmp_path / "missing"
    assert f"cannot read {missing}: No such file" in await refusal(Etcd(tls_server.addresses, Tls(missing)))
    unusable = tmp_path / "unusable"
    unusable.write_text("no PEM")
    for tls in (Tls(unusable), ours._replace(key=unusable), ours._replace(key=stranger.issue("other").key)):
        assert "cannot use the TLS files" in await refusal(Etcd(tls_server.addresses, tls))
    async with Etcd(tls_server.addresses, ours, deadline_s=PATIENT_S) as etcd:
        await etcd.put(b"/", b"")


async def test_server_with_the_certificate_of_another_host(authority: Authority) -> None:
    own = authority.issue("elsewhere", "DNS:elsewhere.example")
    async with ScriptedEtcd().serve(tls=own) as script:
        assert "127.0.0.1" in await refusal(Etcd([script.address], Tls(authority.cert)))


async def test_renewed_certificates_are_used(
    tls_server: EtcdCluster, authority: Authority, tmp_path: Path
) -> None:
    mine = Tls(authority.cert, tmp_path / "mine.crt", tmp_path / "mine.key")
    assert mine.cert is not None
    assert mine.key is not None
    async with Etcd(tls_server.addresses, mine, deadline_s=PATIENT_S) as etcd:
        etcd._calls.repeat_s = 0.0
        with pytest.raises(EtcdUnavailable, match="cannot read"):
            await etcd.put(b"/", b"")
        issued = authority.issue("mine")
        assert issued.cert is not None
        assert issued.key is not None
        issued.key.rename(mine.key)
        issued.cert.rename(mine.cert)
        await etcd.put(b"/", b"")


# Users and roles.


def user(folder: Path, name: str, password: str = "") -> User:
    """Return a user with a password file in a folder, by default with the right password."""
    file = folder / f"password-of-{name}"
    file.write_text(password or PASSWORDS[name])
    return User(name, file)


@pytest.fixture
def writer(tmp_path: Path) -> User:
    return user(tmp_path, "machine-a")


@pytest.fixture
def reader(tmp_path: Path) -> User:
    return user(tmp_path, "reader")


def enable_authentication(server: EtcdCluster) -> None:
    """Create the users root, machine-a, who may write /a/ and read /, and reader, who may read /."""
    server.ctl("role", "add", "reader")
    server.ctl("role", "grant-permission", "reader", "--prefix=true", "read", "/")
    server.ctl("role", "add", "writer")
    server.ctl("role", "grant-permission", "writer", "--prefix=true", "readwrite", "/a/")
    for name, roles in [("root", ["root"]), ("machine-a", ["reader", "writer"]), ("reader", ["reader"])]:
        server.ctl("user", "add", name, "--interactive=false", input=PASSWORDS[name])
        for role in roles:
            server.ctl("user", "grant-role", name, role)
    server.ctl("auth", "enable")


def as_root(server: EtcdCluster, *arguments: str, input: str | None = None) -> str:
    return server.ctl(*arguments, options=["--user", f"root:{PASSWORDS['root']}"], input=input)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """A member with users, whose tokens expire after a second without a call."""
    options = ("--bcrypt-cost", "4", "--auth-token-ttl", "1")
    with cluster(tmp_path_factory.mktemp("etcd"), options=options) as running:
        enable_authentication(running)
        yield running


async def test_roles(guarded: EtcdCluster, writer: User, reader: User) -> None:
    async with (
        Etcd(guarded.addresses, user=writer, deadline_s=PATIENT_S) as one,
        Etcd(guarded.addresses, user=reader, deadline_s=PATIENT_S) as other,
        one.lease(10) as lease,
    ):
        revision = await one.put(b"/a/x", b"1", lease.id)
        assert (await one.claim(b"/a/claim", b"", lease.id)).lease == lease.id
        assert set((await other.read(b"/a/")).records) == {b"/a/x", b"/a/claim"}
        async with following(other, b"/a/", revision) as follower:
            await follower.until_revision(await one.delete(b"/a/x"))
        for call in (one.put(b"/b/x", b""), other.put(b"/a/x", b""), other.read(b"")):
            with pytest.raises(EtcdRefused, match="permission denied"):
                await call
        async with following(other, b"", revision) as follower:
            await until(lambda: follower.error)
        assert isinstance(follower.error, EtcdRefused)
        await other.read(b"/a/")


async def test_wrong_user_or_password(guarded: EtcdCluster, tmp_path: Path) -> None:
    for name in ("nobody", "machine-a"):
        async with Etcd(guarded.addresses, user=user(tmp_path, name, "wrong"), deadline_s=PATIENT_S) as etcd:
            with pytest.raises(EtcdRefused, match=f"authentication failed.*{name}"):
                await etcd.read(b"/a/")
            async with following(etcd, b"/a/", 1) as follower:
                await until(lambda: follower.error)
            assert isinstance(follower.error, EtcdRefused)
    async with Etcd(guarded.addresses, deadline_s=PATIENT_S) as etcd:
        with pytest.raises(EtcdRefused, match="user name is empty"):
            await etcd.read(b"/a/")


async def test_user_without_authentication_in_etcd(server: EtcdCluster, prefix: bytes, writer: User) -> None:
    async with Etcd(server.addresses, user=writer, deadline_s=PATIENT_S) as etcd:
        await etcd.put(prefix, b"")


@pytest.mark.long
async def test_authentication_enabled_later(tmp_path: Path, writer: User) -> None:
    with cluster(tmp_path, options=("--bcrypt-cost", "4")) as server:
        async with Etcd(server.addresses, user=writer, deadline_s=PATIENT_S) as etcd, etcd.lease(10) as lease:
            await etcd.put(b"/a/x", b"", lease.id)
            await asyncio.to_thread(enable_authentication, server)
            revision = await etcd.put(b"/a/x", b"2", lease.id)
            async with following(etcd, b"/a/", revision - 1) as follower:
                await follower.until_revision(revision)


def expired_tokens(server: EtcdCluster) -> int:
    return server.members[0].log.read_text().count("deleted a simple token")


@pytest.mark.parametrize("first_use", ["call", "watch"])
@pytest.mark.long
async def test_expired_token(
    guarded: EtcdCluster, writer: User, first_use: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Etcd(guarded.addresses, user=writer, deadline_s=PATIENT_S) as etcd:
        revision = await etcd.put(b"/a/x", b"")
        expired = expired_tokens(guarded)
        await until(lambda: expired_tokens(guarded) > expired)
        if first_use == "call":
            await etcd.put(b"/a/x", b"")
        async with following(etcd, b"/a/", revision - 1) as follower:
            await follower.until_revision(revision)
    assert not [record for record in caplog.records if record.name == "regd.bridge"]


@pytest.mark.long
async def test_watch_and_lease_outlive_the_token(guarded: EtcdCluster, writer: User) -> None:
    async with Etcd(guarded.addresses, user=writer, deadline_s=PATIENT_S) as etcd, etcd.lease(6) as lease:
        revision = await etcd.put(b"/a/x", b"", lease.id)
        async with following(etcd, b"/a/", revision) as follower:
            for _ in range(3):
                expired = expired_tokens(guarded)
                await until(lambda expired=expired: expired_tokens(guarded) > expired)  # type: ignore[misc]
                await follower.until_revision(await etcd.put(b"/a/x", b"", lease.id))
        assert not lease.lost.is_set()


@pytest.mark.long
async def test_restart_of_etcd_invalidates_tokens(tmp_path: Path, writer: User) -> None:
    with cluster(tmp_path, options=("--bcrypt-cost", "4")) as server:
        enable_authentication(server)
        async with Etcd(server.addresses, user=writer, deadline_s=PATIENT_S) as etcd, etcd.lease(10) as lease:
            revision = await etcd.put(b"/a/x", b"", lease.id)
            async with following(etcd, b"/a/", revision) as follower:
                server.members[0].kill()
                await asyncio.to_thread(server.start)
                await follower.until_revision(await etcd.put(b"/a/y", b"", lease.id))
            assert not lease.lost.is_set()


@pytest.mark.long
async def test_changed_password(tmp_path: Path, writer: User) -> None:
    with cluster(tmp_path, options=("--bcrypt-cost", "4")) as server:
        enable_authentication(server)
        async with Etcd(server.addresses, user=writer, deadline_s=PATIENT_S) as etcd:
            await etcd.put(b"/a/x", b"")
            as_root(server, "user", "passwd", writer.name, "--interactive=false", input="new")
            with pytest.raises(EtcdRefused, match="authentication failed"):
                await etcd.put(b"/a/x", b"")
            writer.password_file.write_text("new\n")
            await etcd.put(b"/a/x", b"")


# JSON Web Tokens, which contain their time of expiry and the revision of users and roles.


@pytest.fixture(scope="module")
def jwt_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    folder = tmp_path_factory.mktemp("jwt")
    private, public = folder / "private.pem", folder / "public.pem"
    for arguments in (
        ["genrsa", "-out", str(private), "2048"],
        ["rsa", "-in", str(private), "-pubout", "-out", str(public)],
    ):
        subprocess.run([need("openssl"), *arguments], check=True, capture_output=True, timeout=PATIENT_S)
    kind = f"jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl=1s"
    with cluster(folder, options=("--bcrypt-cost", "4", "--auth-token", kind)) as running:
        enable_authentication(running)
        yield running


def expires_at(token: str) -> float:
    claims = token.split(".")[1]
    return float(json.loads(urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["exp"])


@pytest.mark.parametrize("first_use", ["call", "watch"])
@pytest.mark.long
async def test_expired_jwt(jwt_server: EtcdCluster, writer: User, first_use: str) -> None:
    async with Etcd(jwt_server.addresses, user=writer, deadline_s=PATIENT_S) as etcd:
        revision = await etcd.put(b"/a/x", b"")
        token = etcd._calls._token
        assert token is not None
        await until(lambda: time.time() > expires_at(token) + 1)
        if first_use == "call":
            await etcd.put(b"/a/x", b"")
        async with following(etcd, b"/a/", revision - 1) as follower:
            await follower.until_revision(revision)
        assert etcd._calls._token != token


@pytest.mark.parametrize("first_use", ["call", "watch"])
@pytest.mark.sample(2)
async def test_jwt_from_before_a_change_of_users(jwt_server: EtcdCluster, writer: User, first_use: str) -> None:
    async with Etcd(jwt_server.addresses, user=writer, deadline_s=PATIENT_S) as etcd:
        revision = await etcd.put(b"/a/x", b"")
        as_root(jwt_server, "user", "add", f"another-{first_use}", "--interactive=false", input="x")
        if first_use == "call":
            await etcd.put(b"/a/x", b"")
        async with following(etcd, b"/a/", revision - 1) as follower:
            await follower.until_revision(revision)
