"""The example of `make cluster`: two machines on this one, with a daemon, a bridge and a runner each.

The caller is on machine b. Both machines have the address 127.0.0.1. The example needs the extra `etcd`, and
etcd, which it starts on a free port. It runs until Ctrl-C or SIGTERM, and then stops everything.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import processes
from processes import HERE, PATH, end_on_signals, environment, say

REGCTL = ("-m", "regd.cli.regctl")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def running(
    label: str, *command: str, ready: Callable[[str], bool], address: str = ""
) -> AbstractContextManager[Popen[str]]:
    return processes.running(
        *command, environment=environment(address), ready=ready, show=lambda line: say(f"  {label}: {line}")
    )


@contextlib.contextmanager
def etcd(folder: Path) -> Iterator[str]:
    """Run a member of etcd, and yield its address."""
    program = shutil.which("etcd")
    if program is None:
        raise SystemExit("etcd is not installed: apt install etcd-server")
    client, peer = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    command = [
        program, "--data-dir", str(folder / "etcd"), "--listen-client-urls", f"http://{client}",
        "--advertise-client-urls", f"http://{client}", "--listen-peer-urls", peer,
        "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
    ]  # fmt: skip
    with processes.running(
        *command,
        environment=os.environ,
        ready=lambda line: "ready to serve client requests" in line,
        show=lambda line: None,
    ):
        yield client


@contextlib.contextmanager
def machine(name: str, port: int, etcd_address: str, folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Run a daemon, a bridge and a runner. Yield the daemon's address, and the ids of the three processes."""
    address = f"tcp://127.0.0.1:{free_port()}"
    daemon = ["-m", "regd", "--log-level", "warning", "--port", address.rpartition(":")[2]]
    daemon += ["--registry", str(folder / name / "registry.json")]
    bridge = [*REGCTL, "bridge", "--etcd", etcd_address, "--machine", name, "--advertise", "127.0.0.1"]
    runner = [str(HERE / "runner.py"), str(port)]
    with (
        running(f"{name} regd", sys.executable, *daemon, ready=lambda line: "listening" in line) as one,
        running(
            f"{name} bridge",
            sys.executable,
            *bridge,
            address=address,
            ready=lambda line: "connected to the daemon" in line,
        ) as two,
        running(
            f"{name} runner",
            sys.executable,
            *runner,
            address=address,
            ready=lambda line: "registered" in line,
        ) as three,
    ):
        yield address, [one.pid, two.pid, three.pid]


def main() -> None:
    end_on_signals()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("1. etcd, and two machines with a daemon, a bridge and a runner each:")
        with (
            etcd(folder) as etcd_address,
            machine("a", free_port(), etcd_address, folder) as (_, pids),
            machine("b", free_port(), etcd_address, folder) as (address_b, _),
        ):
            say("2. The runner on b becomes the spare: its priority is 200, that of the one on a is 100 there.")
            regctl(address_b, "update", "runner", "--priority", "200")
            say("3. The caller on b asks its own daemon for runner, and calls the one on a:")
            caller = [sys.executable, str(HERE / "caller.py")]
            with running("b", *caller, address=address_b, ready=lambda line: "got" in line):
                say("4. What b has:")
                say(regctl(address_b, "list").rstrip())
                say("5. Your turn, in another terminal:")
                say(f"  kill -9 {pids[2]}   # the runner on a: the caller continues with the one on b at once")
                words = " ".join(map(str, pids))
                say(f"  kill -9 {words}   # the whole machine a: within 10 s, when its lease has ended")
                command = f"PYTHONPATH={PATH} {sys.executable} -m regd.cli.regctl bridge --status"
                say(f"  REGD_ADDRESS={address_b} {command}")
                say("Ctrl-C ends all of this.")
                signal.pause()


def regctl(address: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *REGCTL, *words], env=environment(address), capture_output=True, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("Ended: caller, machines, etcd.")
