"""The programs of the benchmarks compile, replies are checked, and the pages have the saved results."""

import contextlib
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import page, results
from tests.benchmarks.bench import Bench
from tests.benchmarks.caller import value
from tests.benchmarks.calling import call
from tests.benchmarks.figures import number, ratio
from tests.benchmarks.generator import COMPILER, Generator, Measured, WrongReply, build
from tests.benchmarks.peers import Redis
from tests.benchmarks.rows import ROWS
from tests.benchmarks.servers import Floor, Regd, Server

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")
# A run is repeated where it must have a reply: on a busy machine a tenth of a second may pass without one.
SHORT: dict[str, Any] = {"names": 100, "connections": 10, "seconds": 0.1}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the compiled C programs."""
    folder = tmp_path_factory.mktemp("programs")
    build(folder)
    return folder


@pytest.fixture
def bench(programs: Path, tmp_path: Path) -> Bench:
    return Bench(Generator(programs), tmp_path, rounds=2, seconds=0.1, warm_s=0.02, warm_up_s=0.1, patience_s=0)


@needs_compiler
@pytest.mark.sample(6)
@pytest.mark.parametrize("kind", [Regd, Redis])
@pytest.mark.parametrize(("work", "depth"), [("read", 1), ("read", 8), ("write", 1)])
def test_server_replies_are_correct(bench: Bench, kind: type[Server], work: str, depth: int) -> None:
    if kind.missing():
        pytest.skip(f"no {kind.missing()} on this machine")
    with bench.running([kind], durable=True, names=100) as [server]:
        measured: Measured = {"replies": 0}
        while not measured["replies"]:
            measured = bench.load.run(server, work=work, depth=depth, **SHORT, verify=100)
    assert 0 < measured["p50_us"] <= measured["p99_us"]


@pytest.mark.long
@needs_compiler
def test_row_is_measured_in_rounds(bench: Bench) -> None:
    with bench.running([Floor, Regd], names=100) as servers:
        found = bench.in_turn({server.label: bench.ask(server, names=100, connections=10) for server in servers})
    assert {what: len(rounds) for what, rounds in found.items()} == {"floor": 2, "regd": 2}
    # Not in every round: on a busy machine a tenth of a second may pass without a reply.
    assert all(any(measured["a_second"] > 0 for measured in rounds) for rounds in found.values())


def repeat(run: Callable[..., object], *arguments: Any, **more: Any) -> None:
    """Repeat a short run until it raises an exception."""
    while True:
        run(*arguments, **more)


@needs_compiler
def test_wrong_reply_stops_the_run(bench: Bench) -> None:
    """The floor server answers for every name what regd would answer for the first."""
    with bench.running([Floor]) as [server]:
        server.protocol = "regd"  # type: ignore[misc]
        with pytest.raises(WrongReply, match="wrong reply to svc-"):
            repeat(bench.load.run, server, **SHORT)


class _Forgetful(socketserver.StreamRequestHandler):
    """A server that acknowledges a register but keeps the old value."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the caller disconnects when it sees the wrong value
            self._answer()

    def _answer(self) -> None:
        for line in self.rfile:
            request = json.loads(line)
            at = {
                "name": request["name"],
                "instance": "",
                "host": "127.0.0.1",
                "port": 10_000 + int(request["name"][4:]),
            }
            if request["cmd"] == "resolve":
                at |= {"meta": {"n": "0000000000"}, "state": "ready"}
            self.wfile.write(json.dumps({"ok": True, **at, "rev": 1}, separators=(",", ":")).encode() + b"\n")


class _Threads(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


@pytest.fixture
def forgetful_port() -> Iterator[int]:
    with _Threads(("127.0.0.1", 0), _Forgetful) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@needs_compiler
def test_lost_write_stops_the_run(bench: Bench, forgetful_port: int) -> None:
    with bench.running([Floor]) as [server]:
        server.protocol, server.port = "regd", forgetful_port  # type: ignore[misc]
        bench.load.run(server, **SHORT)
        bench.load.run(server, work="write", **SHORT)
        with pytest.raises(WrongReply, match="wrong reply to svc-"):
            repeat(bench.load.run, server, work="write", **SHORT, verify=100)


@needs_compiler
def test_every_watcher_receives_every_change(bench: Bench) -> None:
    with bench.running([Regd], names=100) as [server]:
        measured = bench.load.run(server, "follow", watchers=5, changes=10, warm=2)
    assert measured["replies"] == 50
    assert measured["p50_us"] <= measured["last_p99_us"]


@needs_compiler
def test_client_answers_are_correct(bench: Bench) -> None:
    with bench.running([Regd], names=1_000) as [server]:
        while not call("regd", server, tasks=5, warm=0.01, seconds=0.1)["a_second"]:
            pass
        assert call("mirror", server, seconds=0.05)["mirror_us"] > 0
    with bench.running([Regd], names=10) as [server], pytest.raises(WrongReply, match="svc-"):
        repeat(call, "regd", server, tasks=5, warm=0.01, seconds=0.1)


def test_peers_store_a_value_of_the_same_size() -> None:
    assert json.loads(value(50_007)) == {
        "name": "svc-050007", "instance": "", "host": "127.0.0.1", "port": 10_007, "meta": {"n": "0000000000"}, "state": "ready",
    }  # fmt: skip


def test_ratios_compare_within_one_round() -> None:
    rounds = {"one": [{"a": 1.0}, {"a": 20.0}, {"a": 3.0}], "other": [{"a": 1.0}, {"a": 10.0}, {"a": 6.0}]}
    assert ratio(rounds, "one", "other", "a") == (1.0, 0.5, 2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1_234_567, "1,230,000"), (999.6, "1,000"), (1_000, "1,000"), (12.34, "12.3"), (0.1234, "0.123")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_row_names_are_unique() -> None:
    assert len({row.word for row in ROWS}) == len(ROWS)


def test_pages_show_the_saved_results(tmp_path: Path) -> None:
    copies = {original: tmp_path / original.name for original in (page.PAGE, page.TARGETS)}
    for original, copy in copies.items():
        copy.write_text(original.read_text())
    page.write(results.load(), *copies.values())
    for original, copy in copies.items():
        assert copy.read_text() == original.read_text(), "write it again: python -m tests.benchmarks --page"


def test_saved_results_load_unchanged(tmp_path: Path) -> None:
    saved = results.load()
    results.keep(saved, tmp_path / "again.json")
    assert results.load(tmp_path / "again.json") == saved
