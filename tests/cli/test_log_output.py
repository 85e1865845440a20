"""The daemon's log: dropped lines are counted, partial lines are completed, and no failure is raised."""

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regd.cli import log_output
from regd.cli.log_output import JsonLines, LogOutput, TextLines
from regd.cli.output import visible
from tests.support.daemon import WAIT_S


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LogOutput]:
    """A log to a file that handles only records passed to `emit`; the logging module is not changed."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks", "_srcfile"):
        monkeypatch.setattr(logging, name, getattr(logging, name, True), raising=False)
    made = LogOutput(tmp_path / "log", "text")
    yield made
    made.close()
    os.close(made.fd)


def record(message: str, *args: object, **more: object) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "args": args, "levelname": "INFO", **more})


def until_idle(output: LogOutput) -> None:
    late = time.monotonic() + WAIT_S
    while output._pending_bytes:
        assert time.monotonic() < late
        time.sleep(0.001)


def lines(path: Path) -> list[str]:
    return [
        line.partition(" INFO ")[2] or line.partition(" WARNING ")[2] for line in path.read_text().splitlines()
    ]


def test_lines_lost_to_a_full_disk_are_counted(
    output: LogOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failing = os.write, threading.Event()

    def write(fd: int, data: bytes) -> int:
        if fd == output.fd and failing.is_set():
            if len(data) > 20:
                return real(fd, data[:20])  # the disk is full in the middle of a line
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    output.start("info")
    output.emit(record("before"))
    until_idle(output)
    monkeypatch.setattr(os, "write", write)
    failing.set()
    for number in range(3):
        output.emit(record("lost %d", number))
        until_idle(output)
    failing.clear()
    output.emit(record("after"))
    output.close()
    said = lines(tmp_path / "log")
    assert said[0] == "before"
    assert said[-2:] == ["3 log lines were dropped: No space left on device", "after"]


def test_unread_lines_are_bounded_and_counted(
    output: LogOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_output, "_PENDING_BYTES_MAX", 1_000)
    gate, real = threading.Event(), os.write

    def write(fd: int, data: bytes) -> int:
        if fd == output.fd:
            assert gate.wait(WAIT_S)
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    output.start("info")
    for number in range(100):
        output.emit(record("line %d", number))
        assert output._pending_bytes <= 1_000
    gate.set()
    until_idle(output)
    output.emit(record("after"))
    output.close()
    said = lines(tmp_path / "log")
    written = sum(line.startswith("line ") for line in said)
    assert 0 < written < 100
    assert said[:written] == [f"line {number}" for number in range(written)]
    assert said[-2:] == [f"{100 - written} log lines were dropped: it is not read fast enough", "after"]


def test_stuck_reader_does_not_delay_the_exit(output: LogOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_output, "_CLOSE_S", 0.01)
    gate, real = threading.Event(), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: gate.wait(WAIT_S) and real(fd, data))
    output.start("info")
    thread = output._thread
    assert thread is not None
    output.emit(record("line"))
    output.close()
    assert thread.is_alive()
    gate.set()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_message_is_one_line_without_control_characters() -> None:
    hostile = "a\nb\r\x1b[31m\x7f\u202e\udcff\u0085é"
    assert visible(hostile) == r"a\nb\r\x1b[31m\x7f\u202e\udcff\x85é"
    assert TextLines().format(record("%s", hostile)).count("\n") == 0
    line = JsonLines().format(record("%s", hostile))
    assert line.isascii()
    assert json.loads(line)["message"] == visible(hostile)


def test_traceback_is_in_the_json_object() -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        caught = (type(error), error, error.__traceback__)
    line = JsonLines().format(record("regd ends", exc_info=caught))
    assert "ZeroDivisionError" in json.loads(line)["exception"]
    assert line.count("\n") == 0
    assert TextLines().format(record("regd ends", exc_info=caught)).count("\n") > 2


def test_message_that_cannot_be_formatted_raises_nothing(output: LogOutput, tmp_path: Path) -> None:
    output.start("info")
    output.emit(record("%d", "no number"))
    output.close()
    assert "cannot be formatted" in (tmp_path / "log").read_text()
