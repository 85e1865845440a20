"""The page of the bridge: its commands run, and do what it says."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from regd.bridge import bridge, foreign, metrics, reachability, records
from regd.cli import commands
from regd.core.limits import DEFAULT
from tests.support.daemon import ROOT, WAIT_S, environment
from tests.support.documents import blocks, fits
from tests.support.etcd import need
from tests.support.machines import Machine
from tests.support.network import network
from tests.support.polling import block_until
from tests.support.ports import free_port

PAGE = ROOT / "regd" / "bridge" / "README.md"
START_S = 60.0  # for etcd, on a busy machine


class Shell:
    """Runs lines of the page in a folder, and ends at the end what still runs.

    Args:
        before: the command line to run all under.
        replaced: what is different here, such as ports.
    """

    def __init__(self, folder: Path, replaced: Mapping[str, str], before: Sequence[str] = ()) -> None:
        folder.mkdir()
        self._folder = folder
        self._replaced = replaced
        self._before = before
        self._running: list[subprocess.Popen[bytes]] = []
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = environment(PATH=path, XDG_STATE_HOME=str(folder), ETCDCTL_API="3")

    def _command(self, line: str) -> list[str]:
        for old, new in self._replaced.items():
            line = line.replace(old, new)
        return [*self._before, "bash", "-c", line]

    def export(self, line: str) -> None:
        """Run an `export`."""
        for word in shlex.split(self._command(line)[-1])[1:]:
            name, _, value = word.partition("=")
            self._environment[name] = value

    def start(self, line: str) -> None:
        """Run a program in the background."""
        with (self._folder / f"log{len(self._running)}").open("wb") as log:
            command = self._command(f"exec {line.removesuffix('&')}")
            self._running.append(
                subprocess.Popen(command, cwd=self._folder, env=self._environment, stdout=log, stderr=log)
            )

    def run(self, line: str, input: str | None = None) -> str:
        """Run a program and return what it prints."""
        done = subprocess.run(
            self._command(line), cwd=self._folder, env=self._environment, input=input,
            capture_output=True, text=True, timeout=2 * WAIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def succeeds(self, line: str) -> bool:
        command = self._command(line)
        done = subprocess.run(command, cwd=self._folder, env=self._environment, capture_output=True, check=False)
        return done.returncode == 0

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2_000:] for path in sorted(self._folder.glob("log*")))

    def close(self) -> None:
        for process in reversed(self._running):
            process.send_signal(signal.SIGTERM)
        for process in self._running:
            try:
                process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lines(title: str, kind: str = "sh") -> list[str]:
    """Return the command lines in a section, with their comments."""
    [section] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found = re.findall(rf"^```{kind}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [line for text in found for line in text.replace("\\\n", "").splitlines()]


def test_regctl_understands_every_command() -> None:
    count = 0
    for text in blocks(PAGE, "sh") + re.findall("`(regctl [a-z]+ .*?)`", PAGE.read_text(), re.DOTALL):
        for line in re.findall(r"\bregctl [^#&|)\n]*", text.replace("\\\n", "").replace(" `", "`")):
            commands.read(shlex.split(line)[1:])
            count += 1
    assert count >= 8


@pytest.mark.long
def test_two_machines(tmp_path: Path) -> None:
    """Run the commands of the first section, on three machines: a namespace each."""
    need("etcd"), need("curl")
    with contextlib.ExitStack() as stack:
        try:
            net = stack.enter_context(network(3))
        except OSError as error:
            pytest.skip(f"{error}; the next test has two addresses instead")
        replaced = {"10.0.0.1:": f"{net.address(1)}:", "10.0.0.7": net.address(2), "10.0.0.8": net.address(3)}
        etcd, a, b = (
            stack.enter_context(Shell(tmp_path / name, replaced, net.before(number)))
            for number, name in enumerate(("etcd", "a", "b"), 1)
        )
        found = ""
        for line in lines("Two machines in five minutes"):
            command, _, comment = (part.strip() for part in line.partition("#"))
            machines = [{"on a": a, "on b": b}[comment]] if comment else [a, b]
            if command.startswith("etcd "):
                etcd.start(command)
            elif command.startswith("pip ") or not command:
                continue
            elif command.endswith("&") or command.startswith("regctl run"):
                for machine in machines:
                    machine.start(command)
            else:
                [machine] = machines
                found = machine.run(command)
        assert "log0" in found  # the web server lists its folder
        assert b.run("regctl resolve web") == f"{net.address(2)}:8000\n"


@pytest.fixture
def plain_etcd(tmp_path: Path) -> Iterator[str]:
    """An etcd that is started by its name alone, on a free port."""
    need("etcd")
    with Shell(tmp_path / "etcd", {}) as shell:
        address = f"127.0.0.1:{free_port()}"
        shell.start(
            f"etcd --listen-client-urls http://{address} --advertise-client-urls http://{address}{peer()}"
        )
        block_until(lambda: shell.succeeds(f"etcdctl --endpoints {address} endpoint health"), START_S)
        yield address


def peer() -> str:
    """Return the options of etcd for a free port to other members."""
    url = f"http://127.0.0.1:{free_port()}"
    return f" --listen-peer-urls {url} --initial-advertise-peer-urls {url} --initial-cluster default={url}"


def test_two_machines_on_one(plain_etcd: str, tmp_path: Path) -> None:
    """Run the session of the page, on free ports, then show what the page shows of it."""
    ports = {number: str(free_port()) for number in ("7401", "7402", "8000")} | {"127.0.0.1:2379": plain_etcd}
    with Shell(tmp_path / "one", ports) as shell:
        [session] = blocks(PAGE, "console")
        for entry in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            command, _, expected = entry.partition("\n")
            if command.endswith("&"):
                shell.start(command)
                # A bridge that starts before a daemon may get the daemon's port for its metrics.
                numbers = re.findall("^regd --port ([0-9]+)", command)
                awaited = [f"listening tcp://127.0.0.1:{ports[number]}\n" for number in numbers]
                block_until(lambda awaited=awaited: all(line in shell.logs() for line in awaited))  # type: ignore[misc]
            else:
                assert shell.run(command) == expected.replace("8000", ports["8000"])
        address = "regctl --address 127.0.0.1:7401"
        [shown, checked] = blocks(PAGE, "text")[1:]
        command, expected = shown.removeprefix("$ regctl").split("\n", 1)
        assert words(shell.run(address + command), expected)
        command, expected = checked.removeprefix("$ regctl").split("\n", 1)
        assert words(shell.run(address + command), expected)


def words(printed: str, expected: str) -> bool:
    """Return whether lines are as on the page, which shows them as on a terminal, in columns with a header."""
    rows = [" ".join(line.split()) for line in expected.splitlines() if not line.startswith("MACHINE ")]
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert len(rows) == len(lines), printed
    return all(map(fits, rows, lines))


@pytest.mark.long
def test_tls_and_users(tmp_path: Path) -> None:
    """Run the commands of the section: a machine may write its own prefix and read all, and no more."""
    need("etcd"), need("openssl")
    address = f"127.0.0.1:{free_port()}"
    replaced = {"10.0.0.1:2379": address, "IP:10.0.0.1": "IP:127.0.0.1"}
    with contextlib.ExitStack() as stack:
        shell = stack.enter_context(Shell(tmp_path / "tls", replaced))
        (tmp_path / "tls" / "password").write_text("secret\n")
        flags: list[str] = []
        for line in lines("etcd with TLS and users"):
            command = line.partition("#")[0].strip()
            if command.startswith("etcd "):
                shell.start(command + peer())
            elif command.startswith("export "):
                shell.export(command)
                block_until(lambda: shell.succeeds("etcdctl endpoint health"), START_S)
            elif command.startswith("etcdctl user add"):
                shell.run(
                    f"{command} --interactive=false", input="root-secret" if "root" in command else "secret"
                )
            elif command.startswith("regctl bridge"):
                words = shlex.split(command)
                flags = words[words.index("--cacert") :]
            else:
                shell.run(command)
        tls = tmp_path / "tls"
        flags = [
            {"ca.pem": str(tls / "ca.pem"), "password": str(tls / "password")}.get(word, word) for word in flags
        ]
        check_roles(shell, address, flags, tmp_path)


def check_roles(shell: Shell, address: str, flags: list[str], folder: Path) -> None:
    root = "etcdctl --user root:root-secret"
    with Machine("a", folder / "a", "10.0.0.7", [address], *flags) as machine:
        machine.start()
        shell.run(root + """ put /regd/v1/default/b/db/ '{"host":"10.0.0.9","port":5432}'""")
        block_until(lambda: "db\tb" in regctl(machine, "list"))
        regctl(machine, "register", "web", "10.0.0.8:80")
        block_until(lambda: shell.run(f"{root} get /regd/v1/default/a/web/"))
        assert machine.bridge.status()["etcd"]["refuses"] == []
    with Machine("ab", folder / "ab", "10.0.0.7", [address], *flags) as other:
        other.start()
        block_until(lambda: other.bridge.status()["etcd"]["refuses"])
        [refusal] = other.bridge.status()["etcd"]["refuses"]
        assert refusal.startswith("to write: ")
        assert "permission denied" in refusal
        assert other.bridge.text().count("etcd refuses to write") == 1
        block_until(lambda: "db\tb" in regctl(other, "list"))  # it may read
        examined = regctl(other, "doctor", check=False)
        assert "wrong  bridge     etcd refuses to write" in examined
    Path(flags[-1]).write_text("wrong\n")
    with Machine("a", folder / "w", "10.0.0.7", [address], *flags) as machine:
        machine.start()
        block_until(lambda: len(machine.bridge.status()["etcd"]["refuses"]) == 2)
        assert "secret" not in machine.bridge.text()


def regctl(machine: Machine, *words: str, check: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "regd.cli.regctl", *words], env=environment(REGD_ADDRESS=machine.address),
        capture_output=True, text=True, timeout=WAIT_S, check=check,
    )  # fmt: skip
    return done.stdout


def test_metrics_of_the_page() -> None:
    names = set(re.findall(r"`(regd_bridge_\w+)", PAGE.read_text()))
    assert len(names) >= 4
    known = {f"regd_bridge_{name}" for _, name, _ in metrics._GAUGES}
    assert names <= known | {f"regd_bridge_{name}_total" for _, name, _ in metrics._COUNTERS}


@pytest.mark.parametrize(
    "fact",
    [
        "50,000",
        "priority is 100 more",
        "beyond 63 characters",
        "after about 10 s",
        "at most every 30 s",
        "Every 60 s",
    ],
)
def test_figures_of_the_page(fact: str) -> None:
    assert fact in " ".join(PAGE.read_text().split())
    assert (foreign.ARRIVALS_MAX, records.PRIORITY_FARTHER, bridge.TTL_S) == (50_000, 100, 10)
    assert (reachability._PAUSE_S[1], DEFAULT.instance_chars_max) == (30.0, 63)
    assert bridge.Options(("h:1",), "a").compare_s == bridge.Options(("h:1",), "a").stale_s == 60
