"""Addresses, request lines and reply lines in the client."""

import subprocess
import sys

import pytest

import regd_client
from regd_client import protocol
from regd_client.protocol import Address, parse_address
from tests.support.daemon import environment


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("tcp://127.0.0.1:7343", Address("127.0.0.1", 7343), "tcp://127.0.0.1:7343"),
        ("localhost:1", Address("localhost", 1), "tcp://localhost:1"),
        ("[::1]:7343", Address("::1", 7343), "tcp://[::1]:7343"),
        ("tcp://[::1]:65535", Address("::1", 65_535), "tcp://[::1]:65535"),
        ("unix:///run/regd.sock", Address("", 0, "/run/regd.sock"), "unix:///run/regd.sock"),
    ],
)
def test_addresses(text: str, address: Address, shown: str) -> None:
    assert vars(parse_address(text)) == vars(address)
    assert str(address) == shown
    assert vars(parse_address(shown)) == vars(address)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7343",
        "localhost",
        "a:0",
        "a:65536",
        "a:x",
        "::1:7343",
        "http://a:1",
        "unix://rel",
        "tcp://",
        "a:-1",
        "tcp://a:1/",
    ],
)
def test_invalid_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        parse_address(text)


@pytest.mark.parametrize(
    "host", ["a", "a.", ".a", "a..b", ".", "..", "a" * 63, "a" * 64, "b." + "a" * 64, "a" * 64 + ".b", "1.2.3.4", "é", "é" * 64]
)  # fmt: skip
def test_hosts_are_valid_idna(host: str) -> None:
    try:
        host.encode("idna")
    except UnicodeError:
        with pytest.raises(ValueError, match="is not an address"):
            parse_address(f"{host}:1")
    else:
        assert parse_address(f"{host}:1").host == host


def test_address_from_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGD_ADDRESS", raising=False)
    assert str(protocol.find_address()) == "tcp://127.0.0.1:7343"
    monkeypatch.setenv("REGD_ADDRESS", "[::1]:1")
    assert str(protocol.find_address()) == "tcp://[::1]:1"
    assert str(protocol.find_address("b:2")) == "tcp://b:2"


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"{}", b'{"ok":true,"event":"up"}', b"\xff", b"[" * 100_000])
def test_invalid_reply(line: bytes) -> None:
    with pytest.raises(regd_client.RegdError, match="not a regd reply"):
        protocol.decode_line(line)


def test_requests_are_one_line_of_json() -> None:
    assert (
        protocol.encode_request("resolve", 3, {"name": "é\n", "all": None})
        == b'{"cmd":"resolve","id":3,"name":"\\u00e9\\n"}\n'
    )
    for value in ({1, 2}, float("nan"), "x" * 70_000):
        with pytest.raises(ValueError):
            protocol.encode_request("resolve", None, {"name": value})


def test_public_names_exist() -> None:
    for name in regd_client.__all__:
        assert getattr(regd_client, name).__name__ == name
    with pytest.raises(AttributeError):
        regd_client.nonsense  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("module", "absent"),
    [("regd_client.blocking", "asyncio"), ("regd_client.client", "regd"), ("regd.cli.regctl", "asyncio")],
)
def test_imports_stay_small(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
