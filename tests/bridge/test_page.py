"""The page of the bridge: its commands run, and do what it says."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from regd.cli import commands
from regd.core.limits import DEFAULT
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.documents import blocks
from tests.support.etcd import EtcdCluster
from tests.support.machines import BridgeProcess, Machine
from tests.support.polling import block_until

PAGE = ROOT / "regd" / "bridge" / "README.md"


def test_regctl_understands_every_command() -> None:
    count = 0
    for text in blocks(PAGE, "sh"):
        for line in re.findall(r"\bregctl [^#&|)\n]*", text.replace("\\\n", "")):
            commands.read(shlex.split(line)[1:])
            count += 1
    assert count >= 7


def test_two_machines_on_one(etcd: EtcdCluster, tmp_path: Path) -> None:
    """Run the session of the page, on free ports."""
    [session] = blocks(PAGE, "console")
    lines = [line.removeprefix("$ ") for line in session.splitlines()]
    assert "regd --port 7401 --registry a.json & regd --port 7402 --registry b.json &" in lines[0]
    with DaemonProcess(tmp_path / "a.json") as one, DaemonProcess(tmp_path / "b.json") as two:
        one.start()
        two.start()

        def adapted(line: str) -> str:
            line = line.replace("127.0.0.1:2379", etcd.addresses[0])
            return line.replace("127.0.0.1:7401", f"127.0.0.1:{one.port}").replace(
                "127.0.0.1:7402", f"127.0.0.1:{two.port}"
            )

        bridges: list[BridgeProcess] = []
        try:
            for line in lines[1:3]:
                words = shlex.split(adapted(line).removesuffix(" &"))
                bridges.append(BridgeProcess(tmp_path / f"log{len(bridges)}", *words[4:], address=words[2]))
                bridges[-1].start()
            with socket.create_server(("127.0.0.2", 0)) as server:  # 5432 may be taken
                port = str(server.getsockname()[1])
                register, registered, show, shown = (line.replace("5432", port) for line in lines[3:7])
                assert run(adapted(register)) == f"{registered}\n"
                block_until(lambda: run(adapted(show)))
                assert run(adapted(show)) == f"{shown}\n"
        finally:
            for bridge in bridges:
                bridge.end()


def run(line: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", line],
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    return done.stdout


def test_the_roles_of_the_page(etcd: EtcdCluster, tmp_path: Path) -> None:
    """A machine may write its own prefix and read all; another one's it may not."""
    [text] = [text for text in blocks(PAGE, "sh") if "etcdctl role add" in text]
    for line in text.splitlines():
        words = shlex.split(line.partition("#")[0])[1:]
        if words == ["auth", "enable"]:
            etcd.ctl("user", "add", "root", "--interactive=false", input="root-secret")
            etcd.ctl("user", "grant-role", "root", "root")
        if words[:2] == ["user", "add"]:
            words.append("--interactive=false")
        etcd.ctl(*words, input="secret")
    password = tmp_path / "password"
    password.write_text("secret\n")
    flags = ("--user", "a", "--password-file", str(password))
    root = ("--user", "root:root-secret")
    with Machine("a", tmp_path / "a", "10.0.0.7", etcd.addresses, *flags) as machine:
        machine.start()
        etcd.ctl("put", "/regd/v1/default/b/db/", '{"host":"10.0.0.9","port":5432}', options=root)
        block_until(lambda: "db\tb" in regctl(machine, "list"))
        regctl(machine, "register", "web", "10.0.0.8:80")
        block_until(lambda: etcd.ctl("get", "/regd/v1/default/a/web/", options=root))
        assert machine.bridge.status()["etcd"]["refuses"] == []
    with Machine("c", tmp_path / "c", "10.0.0.7", etcd.addresses, *flags) as other:
        other.start()
        block_until(lambda: other.bridge.status()["etcd"]["refuses"])
        [refusal] = other.bridge.status()["etcd"]["refuses"]
        assert refusal.startswith("to write: ")
        assert "permission denied" in refusal
        assert other.bridge.text().count("etcd refuses to write") == 1
        assert "db\tb" in regctl(other, "list")  # it may read
        examined = regctl(other, "doctor", check=False)
        assert "wrong  bridge     etcd refuses to write" in examined
    password.write_text("wrong\n")
    with Machine("a", tmp_path / "w", "10.0.0.7", etcd.addresses, *flags) as machine:
        machine.start()
        block_until(lambda: len(machine.bridge.status()["etcd"]["refuses"]) == 2)
        assert "secret" not in machine.bridge.text()


def regctl(machine: Machine, *words: str, check: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "regd.cli.regctl", *words], env=environment(REGD_ADDRESS=machine.address),
        capture_output=True, text=True, timeout=WAIT_S, check=check,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize(
    "fact",
    ["50,000", "priority is 100 more", "beyond 63 characters", "after 10 s", "at most every 30 s", "Every 60 s"],
)
def test_figures_of_the_page(fact: str) -> None:
    from regd.bridge import bridge, foreign, reachability, records

    assert fact in " ".join(PAGE.read_text().split())
    assert (foreign.ARRIVALS_MAX, records.PRIORITY_FARTHER, bridge.TTL_S) == (50_000, 100, 10)
    assert (reachability._PAUSE_S[1], DEFAULT.instance_chars_max) == (30.0, 63)
    assert bridge.Options(("h:1",), "a").compare_s == 60
