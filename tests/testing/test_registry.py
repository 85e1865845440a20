"""`regd.testing` without pytest: its methods, and its error messages."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import regd.testing
import regd_client
from regd.testing import HostError, Registry, running
from regd.testing.host_process import _START, close_unused, host
from regd.testing.registry import OwnRegistry
from regd_client.blocking import BlockingConnection
from tests.support.daemon import ROOT
from tests.support.polling import block_until
from tests.testing.suites import clean, has_ended, watched


def ask(registry: Registry, cmd: str, **arguments: object) -> dict[str, object]:
    with BlockingConnection(registry.address) as connection:
        return connection.ask(cmd, **arguments)


def names(registry: Registry) -> list[str]:
    return [instance["name"] for instance in registry.instances()]


def test_autostart_does_not_replace_the_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGD_AUTOSTART", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with running() as registry:
        registry.stop()
        with pytest.raises(regd_client.Unavailable, match="no regd at"):
            BlockingConnection(registry.address)
        registry.start()
    assert os.environ["REGD_AUTOSTART"] == "1"
    assert not list(tmp_path.iterdir())


def test_registries_inside_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGD_ADDRESS", "tcp://127.0.0.1:1")
    with running() as outer:
        ask(outer, "register", name="outer", port=1)
        with running(tmp_path / "inner.json") as inner:
            assert os.environ["REGD_ADDRESS"] == inner.address == f"tcp://127.0.0.1:{inner.port}"
            ask(inner, "register", name="inner", port=1)
            assert names(inner) == ["inner"]
        assert os.environ["REGD_ADDRESS"] == str(outer)
        assert names(outer) == ["outer"]
        assert "0 registrations at revision 0" in outer.described()
        assert "made the folder" not in outer.described()  # there is none, in memory
        assert "inner.json" not in outer.described()  # what the inner one logged is its own
    assert os.environ["REGD_ADDRESS"] == "tcp://127.0.0.1:1"
    with pytest.raises(regd_client.Unavailable):
        outer.instances()


def test_all_pages() -> None:
    with running() as registry, BlockingConnection(registry.address) as connection:
        for number in range(1_001):
            connection.ask("register", name="worker", instance=f"{number:04}", port=1)
        assert [instance["instance"] for instance in registry.instances()] == [
            f"{number:04}" for number in range(1_001)
        ]
        assert isinstance(registry, OwnRegistry)
        assert registry.described().count("worker/") < 1_000
        assert "more lines" in registry.described()


async def test_service_returns_after_a_restart() -> None:
    with running() as registry:
        async with regd_client.register("runner", 5050), regd_client.mirror("runner") as mirror:
            registry.stop()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", registry.port))
            assert "stopped" in registry.described()
            registry.start()
            registry.start()  # twice is harmless
            assert names(registry) == ["runner"]
            assert mirror.resolve("runner").port == 5050


def test_port_stays_reserved() -> None:
    with running() as registry:
        ask(registry, "register", name="db", port=1)
        registry.stop()
        registry.stop()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", registry.port))
        registry.start()
        assert names(registry) == ["db"]


def test_registry_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with running("deep/registry.json") as registry:
        assert registry.path == tmp_path / "deep/registry.json"
        ask(registry, "register", name="db", port=5432)
        path = registry.path
        block_until(lambda: '"db": {"port": 5432' in path.read_text())  # the next checkpoint
        registry.path.unlink()
        ask(registry, "register", name="other", port=1)
        # The thread that writes is heard, too.
        block_until(lambda: "was removed by another program" in registry.described())
    with running(tmp_path / "deep/registry.json") as registry:
        assert names(registry) == ["db", "other"]


def test_unusable_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "registry.json").write_text("[]")
    before = os.environ.get("REGD_ADDRESS")
    with (
        pytest.raises(HostError, match=r"registry\.json.*nothing was changed"),
        running(tmp_path / "registry.json"),
    ):
        pass
    assert os.environ.get("REGD_ADDRESS") == before
    with running(tmp_path / "other.json"), pytest.raises(HostError, match="in use by another regd"):  # noqa: SIM117
        with running(tmp_path / "other.json"):
            pass


def test_killed_process_is_reported_and_replaced() -> None:
    with running() as registry:
        os.kill(host().pid, signal.SIGKILL)
        with pytest.raises(HostError, match=r"has ended, with status -9"):
            registry.restart()
        assert "cannot read" in registry.described()
        with running() as other:
            assert names(other) == []


def test_failed_process_reports_why() -> None:
    made = host()
    with pytest.raises(HostError, match=r"with status 1\n(.|\n)*ValueError: unknown request"):
        made.ask("dance", daemon=made.ask("open", path=None)["daemon"])


def test_unread_answers_are_discarded() -> None:
    with running() as registry:
        made = host()
        made._send(b'{"id": 0, "do": "open", "path": null}\n')  # as one that was interrupted
        ask(registry, "register", name="db", port=1)
        registry.restart()
        assert names(registry) == ["db"]


def test_many_threads_ask_at_once() -> None:
    def use() -> None:
        try:
            made = OwnRegistry(None)
            ask(made, "register", name=f"a{made.port}", port=1)
            made.restart()
            found.append(names(made) == [f"a{made.port}"])
            made.end()
        except BaseException as error:
            found.append(error)

    found: list[object] = []
    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_unneeded_process_ends() -> None:
    with running():
        pid = host().pid
        close_unused()
        assert host().pid == pid
    with watched(pid) as file:
        close_unused()
        assert has_ended(file)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # and left no zombie


@pytest.mark.parametrize("how", ["stdin", "parent"])
def test_process_ends_with_its_stdin_or_parent(how: str) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as parent, watched(parent.pid) as file:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, str(ROOT), str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file], env=clean(),
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b'{"id": 1, "do": "open", "path": null}\n')
            process.stdin.flush()
            assert b"tcp://127.0.0.1:" in process.stdout.readline()
            process.send_signal(signal.SIGINT)  # is for pytest
            process.stdin.write(b'{"id": 2, "do": "show", "daemon": 1}\n')
            process.stdin.flush()
            assert b'"running": true' in process.stdout.readline()
            if how == "stdin":
                process.stdin.close()
            else:
                parent.kill()
            assert process.wait(15) == 0
        parent.kill()


def test_public_names_of_the_package() -> None:
    assert {"running", "Registry", "HostError", "in_process"} <= set(dir(regd.testing))
    program = "import regd.testing\nwith regd.testing.in_process.running() as made: made.register('db', 1)"
    subprocess.run([sys.executable, "-c", program], env=clean(), timeout=60, check=True)
    assert regd.testing.Registry is Registry
    with pytest.raises(AttributeError, match="walking"):
        getattr(regd.testing, "walking")  # noqa: B009
