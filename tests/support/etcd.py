"""Clusters of etcd for tests: processes on free ports of 127.0.0.1, with their data below a folder."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.polling import block_until

START_S = 60.0  # on a busy machine
_COMMAND_S = 30.0


def need(tool: str) -> str:
    """Return the path of a program, or skip the test."""
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"no {tool} on this machine")
    return found


def reserved_port(host: str = "127.0.0.1") -> socket.socket:
    """Return a socket that reserves a port of an address: a program that sets SO_REUSEADDR can listen there."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, 0))
    return sock


def environment() -> dict[str, str]:
    """Return the environment without variables that configure etcd."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}


class MemberProcess:
    """A member of a cluster: a process that can be killed, frozen and started again."""

    def __init__(
        self, name: str, folder: Path, options: Sequence[str], scheme: str, host: str = "127.0.0.1"
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.data = folder / name
        self._options = options
        self._scheme = scheme
        self._sockets = [reserved_port(host), reserved_port(), reserved_port()]
        self.port, self.peer_port, self._health_port = (sock.getsockname()[1] for sock in self._sockets)
        self.address = f"{host}:{self.port}"
        self.peer_url = f"http://127.0.0.1:{self.peer_port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, cluster: str) -> None:
        """Start the process. `cluster` is all members, as NAME=URL,..."""
        client_url = f"{self._scheme}://{self.address}"
        command = [
            need("etcd"), "--name", self.name, "--data-dir", str(self.data), "--logger", "zap",
            "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
            "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
            "--initial-cluster", cluster, "--listen-metrics-urls", f"http://127.0.0.1:{self._health_port}",
            *self._options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)

    def is_healthy(self) -> bool:
        """Return whether the member serves requests, for which it must know a leader."""
        assert self._process is not None
        assert self._process.poll() is None, f"etcd has ended:\n{self.log.read_text()[-4_000:]}"
        with contextlib.suppress(OSError, ValueError):
            url = f"http://127.0.0.1:{self._health_port}/health"
            with urllib.request.urlopen(url, timeout=_COMMAND_S) as response:
                return bool(json.load(response)["health"] == "true")
        return False

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_until_healthy(self) -> None:
        block_until(self.is_healthy, START_S)

    def metric(self, name: str) -> float:
        """Return a metric without labels."""
        url = f"http://127.0.0.1:{self._health_port}/metrics"
        with urllib.request.urlopen(url, timeout=_COMMAND_S) as response:
            lines = response.read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    def kill(self) -> None:
        """Kill the process with SIGKILL. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        for sock in self._sockets:
            sock.close()


class EtcdCluster:
    """A cluster. `start` starts it.

    Args:
        folder: for data and logs.
        size: number of members.
        options: additional options of etcd.
        scheme, host: of the addresses for clients.
    """

    def __init__(
        self,
        folder: Path,
        size: int = 1,
        options: Sequence[str] = (),
        scheme: str = "http",
        host: str = "127.0.0.1",
    ) -> None:
        need("etcd")
        self.members = [MemberProcess(f"m{number}", folder, options, scheme, host) for number in range(size)]
        self.addresses = [member.address for member in self.members]
        self._names = ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def start(self, *members: MemberProcess) -> None:
        """Start members, all by default, and wait until they serve requests."""
        chosen = members or self.members
        for member in chosen:
            member.start(self._names)
        for member in chosen:
            member.wait_until_healthy()

    def ctl(self, *arguments: str, options: Sequence[str] = (), input: str | None = None) -> str:
        """Run etcdctl, and return what it prints."""
        done = subprocess.run(
            [need("etcdctl"), "--endpoints", ",".join(self.addresses), *options, *arguments],
            env=environment() | {"ETCDCTL_API": "3"}, input=input, capture_output=True, text=True,
            timeout=_COMMAND_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def leader(self) -> MemberProcess:
        """Return the leader."""
        statuses = json.loads(self.ctl("endpoint", "status", "-w", "json"))
        [leading] = [
            status["Endpoint"]
            for status in statuses
            if status["Status"]["leader"] == status["Status"]["header"]["member_id"]
        ]
        return next(member for member in self.members if member.address == leading)

    def restore(self) -> None:
        """Thaw frozen members, start those that have ended, and wait until all serve requests."""
        for member in self.members:
            member.thaw()
        dead = [member for member in self.members if not member.is_running]
        for member in dead:
            member.start(self._names)
        for member in self.members:
            member.wait_until_healthy()

    def close(self) -> None:
        for member in self.members:
            member.close()


@contextlib.contextmanager
def cluster(
    folder: Path, size: int = 1, options: Sequence[str] = (), scheme: str = "http", host: str = "127.0.0.1"
) -> Iterator[EtcdCluster]:
    """Run a cluster during the block."""
    running = EtcdCluster(folder, size, options, scheme, host)
    try:
        running.start()
        yield running
    finally:
        running.close()
