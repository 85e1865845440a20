"""Where the log goes: stderr or a file, as text or JSON, written by a thread so that no reader holds up the loop.

A log that cannot be written never ends the daemon, and costs no unbounded memory: lines are left out and counted.
"""

import contextlib
import json
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STDERR = 2
_PENDING_BYTES_MAX = 4_194_304  # of a log that is read too slowly
_CLOSE_S = 1.0  # for the last lines, when nobody reads them
_OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class LogError(Exception):
    """The log cannot be written. Its text is one line: which, why, what to do."""


def escaped(text: str) -> str:
    """Return a text as one line without control characters: these, and lone surrogates, as Python writes them."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def say(fd: int, text: str) -> None:
    """Write a line to a descriptor. Nothing depends on whether that is possible."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if poll.poll(_CLOSE_S * 1_000):  # else it is a pipe that nobody reads
            os.write(fd, f"{text}\n".encode(errors="backslashreplace"))


class TextLines(logging.Formatter):
    """Time, level and message in each line; behind them, for a bug, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname}"
        lines = [f"{head} {text}" for text, _ in _rows(record)]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)

    def failure(self, message: str) -> str:
        """Return the line that says why regd ends."""
        return f"regd: {message}"


class JsonLines(logging.Formatter):
    """One JSON object a line, with the fields of what happened."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head: dict[str, Any] = {
            "time": f"{seconds}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
        }
        tail = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return "\n".join(
            json.dumps({**head, "message": text, **fields, **tail}, separators=(",", ":"))
            for text, fields in _rows(record)
        )

    def failure(self, message: str) -> str:
        """Return the line that says why regd ends."""
        return self.format(logging.makeLogRecord({"levelname": "ERROR", "msg": "%s", "args": (message,)}))


FORMATS: dict[str, type[TextLines] | type[JsonLines]] = {"text": TextLines, "json": JsonLines}


def _rows(record: logging.LogRecord) -> Sequence[tuple[str, dict[str, Any]]]:
    if hasattr(record.msg, "rows"):  # a regd.server.event_log.Message
        rows: Sequence[tuple[str, dict[str, Any]]] = record.msg.rows
        return rows
    return [(escaped(record.getMessage()), {})]


def open_log(path: Path) -> int:
    """Open a file to append to, for this user alone where it is new.

    Raises:
        LogError: it cannot be had.
    """
    try:
        return os.open(path, _OPEN, 0o600)
    except OSError as error:
        raise LogError(f"cannot write the log {path}: {error.strerror}; name another with --log") from None


class LogOutput(logging.Handler):
    """Writes the log to `path`, or to stderr. The file is open at once, the thread runs from `start` on."""

    def __init__(self, path: Path | None, format: str) -> None:
        super().__init__()
        self.lines = FORMATS[format]()
        self.setFormatter(self.lines)
        self._path = path
        self._fd = _STDERR if path is None else open_log(path)
        self._ready = threading.Condition()
        self._pending: deque[tuple[bytes, int]] = (
            deque()
        )  # lines, and how many are lost if these cannot be written
        self._pending_bytes = 0
        self._left_out = 0  # lines that were not written, and not told of yet
        self._why = ""
        self._torn = False  # the last line was not written to its end
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path | None:
        return self._path

    @property
    def fd(self) -> int:
        return self._fd

    def start(self, level: str) -> None:
        """Take all that the program logs from now on. Call it after any fork: a child has no threads."""
        # Nothing here shows them, and finding them out costs more than the rest of a call.
        for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
            setattr(logging, name, False)
        logging._srcfile = None  # as in the logging HOWTO, "Optimization"
        logging.basicConfig(level=level.upper(), handlers=[self])
        self._thread = threading.Thread(target=self._run, name="regd-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # a bug in one message must not end what it is about
            text = f"{record.levelname} a message of the log cannot be shown"
        self._put(f"{text}\n".encode(errors="backslashreplace"))

    def _put(self, data: bytes) -> None:
        with self._ready:
            count = data.count(b"\n")
            if self._pending_bytes + len(data) > _PENDING_BYTES_MAX:
                self._left_out, self._why = self._left_out + count, "it is not read fast enough"
                return
            if self._left_out:
                data = self._note() + data
                count, self._left_out = count + self._left_out, 0
            self._pending.append((data, count))
            self._pending_bytes += len(data)
            self._ready.notify()

    def _note(self) -> bytes:
        given = {"levelname": "WARNING", "msg": "%d lines of the log were left out: %s"}
        record = logging.makeLogRecord({**given, "args": (self._left_out, self._why)})
        return f"{self.lines.format(record)}\n".encode(errors="backslashreplace")

    def _run(self) -> None:
        while True:
            with self._ready:
                while not (self._pending or self._closing):
                    self._ready.wait()
                if not self._pending:
                    return
                data = b"".join(each for each, _ in self._pending)
                count, size = sum(count for _, count in self._pending), self._pending_bytes
                self._pending.clear()
            why = ""
            try:
                self._write(b"\n" * self._torn + data)
            except OSError as error:
                why = error.strerror or "unknown error"
            with self._ready:
                self._pending_bytes -= size
                if why:
                    self._left_out, self._why = self._left_out + count, why

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                count = os.write(self._fd, view)
            except BlockingIOError:  # a pipe or terminal that somebody made non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
                continue
            self._torn = view[count - 1] != ord("\n") if count else self._torn
            view = view[count:]

    def reopen(self) -> None:
        """Open the file anew, for log rotation. stderr and stdout follow where they lead to the same file.

        Raises:
            LogError: it cannot be had; the old one is written on.
        """
        if self._path is None:
            return
        fd = open_log(self._path)
        try:
            for other in (1, _STDERR):
                if is_same_file(other, self._fd):
                    os.dup2(fd, other)
            os.dup2(fd, self._fd, inheritable=False)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Write what is pending, as far as somebody takes it. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            if self._left_out:
                self._put(b"")  # which tells of them
            with self._ready:
                self._closing = True
                self._ready.notify()
            thread.join(_CLOSE_S)
        super().close()

    def fail(self, message: str) -> None:
        """Say why regd ends: to the log, and to the person at the terminal where that is elsewhere."""
        self.close()
        message = escaped(message)
        say(self._fd, self.lines.failure(message))
        if self._path is not None and not is_same_file(_STDERR, self._fd):
            say(_STDERR, f"regd: {message}")


def is_same_file(one: int, other: int) -> bool:
    """Whether two descriptors lead to the same file."""
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:
        return False


def has_terminal() -> bool:
    """Whether this process has a controlling terminal that has not hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
