"""The fixture `regd`, in test suites that a pytest of their own runs."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import WAIT_S
from tests.testing.suites import Suite, clean, has_ended, watched

HEAD = """
import asyncio, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

import regd.testing
import regd_client
from regd_client.blocking import BlockingConnection

def ask(registry, cmd, **arguments):
    with BlockingConnection(str(registry)) as connection:
        return connection.ask(cmd, **arguments)

def regctl(*arguments):
    command = [sys.executable, "-m", "regd.cli.regctl", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

def tell(*words):
    with open("told", "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

def epoch(registry):  # two registries, one after the other, may have the same port
    return ask(registry, "hello")["epoch"]

def names(registry):
    return [each["name"] for each in registry.instances()]
"""

EVERY_KIND = """
BEFORE = os.environ.get("REGD_ADDRESS")
LAST = []

def test_sync(regd):
    assert names(regd) == []
    assert (regd.address, regd.path) == (f"tcp://127.0.0.1:{regd.port}", None)
    assert os.environ["REGD_ADDRESS"] == str(regd) == regd.address
    regctl("register", "db", "5432")
    code = "import asyncio, regd_client; print(asyncio.run(regd_client.resolve('db')))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found == "127.0.0.1:5432\\n"
    assert names(regd) == ["db"]
    tell(ask(regd, "stats")["pid"])
    LAST.append(regd)

async def test_async(regd):
    assert names(regd) == []
    async with regd_client.register("runner", 5050):
        regd.restart()
        assert str(await regd_client.resolve("runner")) == "127.0.0.1:5050"
        assert names(regd) == ["runner"]

@pytest.mark.anyio
async def test_anyio(regd, anyio_backend):
    assert names(regd) == []
    await regd_client.register("runner", 5050, static=True)
    assert regd.instances()[0]["port"] == 5050

@pytest.fixture
def anyio_backend():
    return "asyncio"

class TestOfUnittest:
    def test_patched_modules_do_not_matter(self, regd, monkeypatch, caplog, capfd):
        import socket
        monkeypatch.setattr(socket, "socket", None)
        monkeypatch.setattr(time, "monotonic", lambda: 0.0)
        regctl("register", "db", "5432")
        regd.restart()
        assert names(regd) == ["db"]
        assert not caplog.records
        assert capfd.readouterr() == ("", "")

def test_that_takes_none():
    assert os.environ.get("REGD_ADDRESS") == BEFORE
    with pytest.raises(regd_client.Unavailable):
        LAST[0].instances()
"""


@pytest.mark.sample(2)
@pytest.mark.parametrize("before", [{}, {"REGD_ADDRESS": "tcp://127.0.0.1:1"}], ids=["unset", "set"])
def test_every_kind_of_test_gets_its_own_registry(tmp_path: Path, before: dict[str, str]) -> None:
    suite = Suite(tmp_path, HEAD + EVERY_KIND)
    shown = suite.passes(**before, PYTHONDEVMODE="1")
    assert "5 passed" in shown
    assert "Warning" not in shown
    [pid] = suite.told()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


TWO_OF_EACH = """
class TestClass:
    def test_one(self, regd):
        tell("class", epoch(regd))

    def test_two(self, regd):
        tell("class", epoch(regd))

def test_of_the_module(regd):
    tell("module", epoch(regd))
"""


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("scope", "registries", "in_class"),
    [("function", 12, 8), ("class", 8, 4), ("module", 4, 4), ("package", 2, 2), ("session", 1, 1), ("run", 1, 1)],
)
def test_each_scope(tmp_path: Path, scope: str, registries: int, in_class: int) -> None:
    suite = Suite(tmp_path, HEAD + TWO_OF_EACH, f"regd_scope = {scope}")
    for package in ("one", "two"):
        suite.write(f"{package}/__init__.py", "")
        suite.write(f"{package}/test_a.py", HEAD + TWO_OF_EACH)
        suite.write(f"{package}/test_b.py", HEAD + TWO_OF_EACH)
    assert "12 passed" in suite.passes("one", "two")
    told = suite.told()
    assert len({line.split()[1] for line in told}) == registries
    assert len({line for line in told if line.startswith("class")}) == in_class


@pytest.mark.sample(3)
@pytest.mark.parametrize("scope", ["function", "session", "run"])
def test_registry_in_tmp_path(tmp_path: Path, scope: str) -> None:
    tests = """
def test_it(regd, tmp_path):
    regctl("register", "db", "5432")
    while '"db": {"port": 5432' not in regd.path.read_text():
        pass  # until the next checkpoint
    assert str(regd.path) in repr(regd)
    tell(regd.path)
"""
    suite = Suite(tmp_path, HEAD + tests, f"regd_scope = {scope}\nregd_storage = tmp_path")
    suite.passes()
    [path] = suite.told()
    assert Path(path).is_relative_to(tmp_path / "basetemp")
    assert os.listdir(Path(path).parent) != []


@pytest.mark.parametrize("line", ["regd_scope = test", "regd_storage = disk"])
def test_wrong_option_is_reported_in_one_line(tmp_path: Path, line: str) -> None:
    status, shown = Suite(tmp_path, "", line).run()
    assert status == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {line}: take one of " in shown
    assert "Traceback" not in shown


WORKER = """
def test_it(regd):
    worker = os.environ["PYTEST_XDIST_WORKER"]
    ask(regd, "register", name=worker, port=5050)
    assert worker in names(regd)
    with open(f"told-{worker}", "w") as file:
        print(regd.address, regd.path, file=file)
"""


@pytest.mark.long
def test_workers_with_a_registry_each(tmp_path: Path) -> None:
    suite = Suite(tmp_path, HEAD + WORKER + "    assert len(names(regd)) == 1", "regd_scope = session")
    suite.passes("-n", "2", "--dist", "each")
    assert suite.told("told-gw0") != suite.told("told-gw1")


@pytest.mark.sample(2)
@pytest.mark.parametrize("storage", ["memory", "tmp_path"])
def test_workers_with_one_registry(tmp_path: Path, storage: str) -> None:
    tests = """
    began = time.monotonic()
    while names(regd) != ["gw0", "gw1"]:
        assert time.monotonic() - began < 30
    with pytest.raises(regd_testing.HostError, match="shared by the whole test run"):
        regd.restart()
    for name in names(regd):
        assert ask(regd, "resolve", name=name)["ok"]
"""
    head = HEAD + "import regd.testing as regd_testing\n"
    suite = Suite(tmp_path, head + WORKER + tests, f"regd_scope = run\nregd_storage = {storage}")
    suite.passes("-n", "2", "--dist", "each")
    assert suite.told("told-gw0") == suite.told("told-gw1")
    assert ("basetemp" in suite.told("told-gw0")[0]) == (storage == "tmp_path")


def test_registry_of_the_whole_run_cannot_be_stopped_without_workers(tmp_path: Path) -> None:
    tests = """
@pytest.mark.parametrize("what", ["stop", "start", "restart"])
def test_it(regd, what):
    with pytest.raises(running.HostError, match="shared by the whole test run"):
        getattr(regd, what)()
    assert names(regd) == []
"""
    Suite(tmp_path, HEAD + "import regd.testing as running\n" + tests, "regd_scope = run").passes()


FAILING = """
@pytest.fixture
def broken(regd):
    ask(regd, "register", name="broken", port=1)
    raise LookupError("as it should")

@pytest.fixture
def own():
    with regd.testing.running() as registry:
        yield registry

def test_call(regd):
    ask(regd, "register", name="called", port=1)
    assert False, "as it should"

def test_setup(broken):
    pass

def test_dynamic(request):
    ask(request.getfixturevalue("regd"), "register", name="dynamic", port=1)
    assert False, "as it should"

def test_own(own):
    ask(own, "register", name="own", port=1)
    assert False, "as it should"

def test_with_none():
    assert False, "as it should"

def test_that_passes(regd):
    ask(regd, "register", name="passed", port=1)
"""


@pytest.mark.sample(8)
@pytest.mark.parametrize("flags", [(), ("-n", "1")], ids=["alone", "worker"])
@pytest.mark.parametrize("scope", ["function", "session", "run"])
def test_failing_test_shows_its_registry(tmp_path: Path, scope: str, flags: tuple[str, ...]) -> None:
    suite = Suite(tmp_path, HEAD + FAILING, f"regd_scope = {scope}")
    status, shown = suite.run(*flags, "-rN")
    assert status == pytest.ExitCode.TESTS_FAILED
    # A heading of each test, and what is below it.
    found = re.split(r"^_+ (?:ERROR at setup of )?test_(\w+) _+$", shown, flags=re.MULTILINE)[1:]
    part = dict(zip(found[::2], found[1::2], strict=True))
    assert sorted(part) == ["call", "dynamic", "own", "setup", "with_none"]
    for test, name in (("call", "called"), ("setup", "broken"), ("dynamic", "dynamic"), ("own", "own")):
        failure, _, registry = part[test].partition("- regd -")
        assert "as it should" in failure
        assert f'"{name}"' in registry
        assert "INFO 0 registrations at revision 0" in registry
    assert "- regd -" not in part["with_none"]
    assert "INTERNALERROR" not in shown


def test_ended_registry_is_reported_and_replaced(tmp_path: Path) -> None:
    tests = """
def test_call(regd):
    os.kill(ask(regd, "stats")["pid"], signal.SIGKILL)
    assert False, "as it should"

def test_next(regd):
    assert names(regd) == []
"""
    status, shown = Suite(tmp_path, HEAD + tests).run()
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "as it should" in shown
    assert "has ended, with status -9" in shown.partition("- regd -")[2]
    assert "1 failed, 1 passed" in shown


@pytest.mark.sample(2)
@pytest.mark.parametrize("python", ["/nowhere/python", ""])
def test_unavailable_registry_is_reported_without_traceback(tmp_path: Path, python: str) -> None:
    suite = Suite(tmp_path, "def test_it(regd): pass")
    suite.write("conftest.py", f"import sys\nsys.executable = {python!r}\n")
    status, shown = suite.run()
    assert status == pytest.ExitCode.TESTS_FAILED
    assert f"regd: cannot start {python or 'a Python'} for the tests' registry: " in shown
    assert "spawn.py" not in shown


SLEEPING = """
@pytest.fixture
def after(regd):
    yield
    tell("after", *names(regd))

def test_it(regd, after):
    {before}
    ask(regd, "register", name="db", port=1)
    with open("pipe", "w") as pipe:
        print(ask(regd, "stats")["pid"], os.getpid(), file=pipe)
    {sleep}
"""
# A child that has all that pytest has open, the pipes to the daemon's process too.
INHERITS = """
    for each in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{each}"):
            os.set_inheritable(int(each), True)
    child = subprocess.Popen(["sleep", "600"], close_fds=False)
    tell(child.pid)
"""


@pytest.mark.sample(4)
@pytest.mark.parametrize("flags", [(), ("-n", "1")], ids=["alone", "worker"])
@pytest.mark.parametrize("scope", ["function", "run"])
def test_kill_9_of_pytest_ends_the_daemon(tmp_path: Path, scope: str, flags: tuple[str, ...]) -> None:
    tests = SLEEPING.format(before=INHERITS.strip(), sleep="time.sleep(600)")
    suite = Suite(tmp_path, HEAD + tests, f"regd_scope = {scope}")
    os.mkfifo(suite.folder / "pipe")
    with suite.started(*flags) as process:
        try:
            pid, worker = suite.told_soon("pipe")
            with watched(int(pid)) as host:
                if flags:
                    os.kill(int(worker), signal.SIGSTOP)  # it would end by itself, but only after a while
                process.kill()
                assert has_ended(host)
            os.kill(int(suite.told()[0]), 0)  # the child lives
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_is_an_orderly_end(tmp_path: Path) -> None:
    suite = Suite(tmp_path, HEAD + SLEEPING.format(before="", sleep="time.sleep(600)"))
    os.mkfifo(suite.folder / "pipe")
    with suite.started() as process:
        pid, _ = suite.told_soon("pipe")
        with watched(int(pid)) as host:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            shown, _ = process.communicate(timeout=WAIT_S)
            assert has_ended(host)
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in shown
    assert suite.told() == ["after db"]


def test_busy_test_does_not_delay_the_daemon(tmp_path: Path) -> None:
    tests = """
import ctypes

def test_it(regd):
    ask(regd, "register", name="db", port=5432)
    out, into = os.pipe()
    code = f"import os, regd_client.blocking as b; os.write({into}, b.resolve('db').name.encode())"
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[into]) as child:
        os.close(into)
        found = ctypes.create_string_buffer(10)
        assert ctypes.PyDLL(None).read(out, found, 10) == 2  # no thread of this process runs until then
        assert found.value == b"db"
    os.close(out)
"""
    Suite(tmp_path, HEAD + tests).passes()


@pytest.mark.long
def test_fixture_of_the_same_name_in_the_suite(tmp_path: Path) -> None:
    tests = """
@pytest.fixture
def regd():
    return "mine"

def test_it(regd):
    assert regd == "mine"
    assert "REGD_ADDRESS" not in os.environ
    assert "regd.testing.host_process" not in sys.modules
"""
    suite = Suite(tmp_path, "import os, sys, pytest\n" + tests)
    suite.passes()
    suite.passes("-p", "no:regd")


def test_fixture_that_uses_the_fixture(tmp_path: Path) -> None:
    tests = """
@pytest.fixture
def regd(regd):
    ask(regd, "register", name="db", port=1)
    return regd

def test_it(regd):
    assert names(regd) == ["db"]
"""
    Suite(tmp_path, HEAD + tests).passes()


def test_test_that_forks(tmp_path: Path) -> None:
    tests = """
def test_it(regd):
    files = os.listdir("/proc/self/fd")
    child = os.fork()
    if child == 0:
        try:
            assert len(os.listdir("/proc/self/fd")) == len(files) - 2  # without the pipes
            assert names(regd) == []
            with pytest.raises(running.HostError, match="of this fork"):
                regd.restart()
            with running.running() as own:
                assert own.port != regd.port
                assert os.environ["REGD_ADDRESS"] == own.address
                ask(own, "register", name="own", port=1)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    regd.restart()
    assert names(regd) == []
"""
    Suite(tmp_path, HEAD + "import regd.testing as running\n" + tests).passes()


def test_unittest_suite(tmp_path: Path) -> None:
    program = """
import os, subprocess, sys, unittest
import regd.testing

class Test(unittest.TestCase):
    def setUp(self):
        self.registry = self.enterContext(regd.testing.running())

    def test_it(self):
        command = [sys.executable, "-m", "regd.cli.regctl", "register", "db", "5432"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.assertEqual(self.registry.instances()[0]["port"], 5432)

    def test_other(self):
        self.assertEqual(self.registry.instances(), [])

    def tearDown(self):
        self.doCleanups()
        assert "REGD_ADDRESS" not in os.environ

unittest.main()
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program], env=clean(), cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Warning" not in done.stderr


def test_plugin_imports_nothing_expensive() -> None:
    program = """
import sys, contextlib, pytest
before = set(sys.modules)
import regd.testing.plugin
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean(), capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "regd regd.testing regd.testing.plugin\n"
