"""`make cluster` shows what its text says, and leaves no process behind."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.daemon import ROOT, WAIT_S, environment
from tests.support.etcd import need


@pytest.mark.long
@pytest.mark.parametrize("what", ["runner", "machine"])
def test_cluster(what: str) -> None:
    need("etcd")
    process = subprocess.Popen(
        [sys.executable, "services/cluster.py"], cwd=ROOT, env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    output = ""

    def read_until(text: str) -> str:
        nonlocal output
        while True:
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line, f"it has ended: {output}"
            output += line
            if text in line:
                return line

    try:
        read_until("found runner at 127.0.0.1:")
        runner = read_until("# the runner on a").split()[2]
        machine = read_until("# the whole machine a").partition("#")[0].split()[2:]
        read_until("Ctrl-C ends")
        first = read_until("found runner at 127.0.0.1:").partition(", sent")[0]
        for pid in [runner] if what == "runner" else machine:
            os.kill(int(pid), signal.SIGKILL)
        while (line := read_until("found runner at 127.0.0.1:")).partition(", sent")[0] == first:
            assert len(output) < 100_000
        assert "got" in line
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=4 * WAIT_S)
        assert process.returncode == 0
        assert "Traceback" not in output + rest
        for pid in machine:
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), 0)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(4 * WAIT_S)
        process.stdout.close()
