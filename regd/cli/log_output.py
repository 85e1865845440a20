"""The daemon's log, to stderr or a file, as text or JSON. A thread writes it, so that the event loop never waits.

If the log cannot be written, the daemon continues; to limit its memory, it drops lines and counts them.
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

from regd.cli.output import visible

_STDERR = 2
_PENDING_BYTES_MAX = 4_194_304  # lines are dropped while more bytes than this wait to be written
_CLOSE_S = 1.0  # to write the last lines
_OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class LogError(Exception):
    """The log file cannot be opened. The message is one line, with the file, the reason, and what to do."""


def write_line(fd: int, text: str) -> None:
    """Write a line to a descriptor, or discard it if that takes longer than a second."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if poll.poll(_CLOSE_S * 1_000):
            os.write(fd, f"{text}\n".encode(errors="backslashreplace"))


class TextLines(logging.Formatter):
    """Formats a record as lines of time, level and message, followed by the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname}"
        lines = [f"{head} {text}" for text, _ in _rows(record)]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)

    def failure(self, message: str) -> str:
        """Return the log line for an error that ends regd."""
        return f"regd: {message}"


class JsonLines(logging.Formatter):
    """Formats a record as JSON objects, one per line, with the fields of the event."""

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
        """Return the log line for an error that ends regd."""
        return self.format(logging.makeLogRecord({"levelname": "ERROR", "msg": "%s", "args": (message,)}))


FORMATS: dict[str, type[TextLines] | type[JsonLines]] = {"text": TextLines, "json": JsonLines}


def _rows(record: logging.LogRecord) -> Sequence[tuple[str, dict[str, Any]]]:
    if hasattr(record.msg, "rows"):  # a regd.server.event_log.Message
        rows: Sequence[tuple[str, dict[str, Any]]] = record.msg.rows
        return rows
    return [(visible(record.getMessage()), {})]


def open_log(path: Path) -> int:
    """Open a file for appending. A new file is readable by this user only.

    Raises:
        LogError: the file cannot be opened.
    """
    try:
        return os.open(path, _OPEN, 0o600)
    except OSError as error:
        raise LogError(f"cannot write the log {path}: {error.strerror}; name another file with --log") from None


class LogOutput(logging.Handler):
    """Writes the log to `path`, or to stderr. Opens the file at once; `start` starts the thread.

    If `bytes_max` is not 0, the file is renamed to `PATH.1` before it would become larger, and a new one begins.
    """

    def __init__(self, path: Path | None, format: str, bytes_max: int = 0) -> None:
        super().__init__()
        self._bytes_max = bytes_max
        self.lines = FORMATS[format]()
        self.setFormatter(self.lines)
        self.path = path
        self.fd = _STDERR if path is None else open_log(path)
        self._ready = threading.Condition()
        # Each element: bytes to write, and the number of dropped lines to count if they cannot be written.
        self._pending: deque[tuple[bytes, int]] = deque()
        self._pending_bytes = 0
        self._dropped = 0  # lines dropped since the last line that reported dropped lines
        self._why = ""
        self._is_line_open = False  # only a part of the last line was written
        self._closing = False
        self._thread: threading.Thread | None = None
        self._rotate(1)  # now, because `fail` writes without the thread, if the start fails

    def start(self, level: str) -> None:
        """Handle all log records of the program from now on. Call it after forking, which keeps no threads."""
        # No log format uses the fields that these settings turn off, and collecting them takes most of a log
        # call.
        for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
            setattr(logging, name, False)
        logging._srcfile = None  # as in the logging HOWTO, "Optimization"
        logging.basicConfig(level=level.upper(), handlers=[self])
        self._thread = threading.Thread(target=self._run, name="regd-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # an invalid log message must not fail the request that logs it
            text = f"{record.levelname} a log message cannot be formatted"
        self._put(f"{text}\n".encode(errors="backslashreplace"))

    def _put(self, data: bytes) -> None:
        with self._ready:
            count = data.count(b"\n")
            if self._pending_bytes + len(data) > _PENDING_BYTES_MAX:
                self._dropped, self._why = self._dropped + count, "it is not read fast enough"
                return
            if self._dropped:
                data = self._note() + data
                count, self._dropped = count + self._dropped, 0
            self._pending.append((data, count))
            self._pending_bytes += len(data)
            self._ready.notify()

    def _note(self) -> bytes:
        fields = {"levelname": "WARNING", "msg": "%d log lines were dropped: %s"}
        record = logging.makeLogRecord({**fields, "args": (self._dropped, self._why)})
        return f"{self.lines.format(record)}\n".encode(errors="backslashreplace")

    def _run(self) -> None:
        while True:
            with self._ready:
                while not (self._pending or self._closing):
                    self._ready.wait()
                if not self._pending:
                    return
                data = b"".join(lines for lines, _ in self._pending)
                count, size = sum(count for _, count in self._pending), self._pending_bytes
                self._pending.clear()
            why = ""
            try:
                self._write_whole_lines(b"\n" * self._is_line_open + data)
            except OSError as error:
                why = error.strerror or "unknown error"
            with self._ready:
                self._pending_bytes -= size
                if why:
                    self._dropped, self._why = self._dropped + count, why

    def _write_whole_lines(self, data: bytes) -> None:
        """Write lines, and rotate the file between two lines where needed."""
        while data:
            end = data.rfind(b"\n", 0, self._bytes_max) + 1 if 0 < self._bytes_max < len(data) else 0
            part = data[: end or len(data)]
            self._rotate(len(part))
            self._write(part)
            data = data[len(part) :]

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                count = os.write(self.fd, view)
            except BlockingIOError:  # another process has made the pipe or terminal non-blocking
                poll = select.poll()
                poll.register(self.fd, select.POLLOUT)
                poll.poll()
                continue
            if count:
                self._is_line_open = view[count - 1] != ord("\n")
            view = view[count:]

    def _rotate(self, count: int) -> None:
        """Start a new file if `count` more bytes do not fit. A file that cannot be renamed grows on."""
        if not self._bytes_max or self.path is None:
            return
        size = os.fstat(self.fd).st_size
        if size and size + count > self._bytes_max:
            with contextlib.suppress(OSError, LogError):
                os.replace(self.path, f"{self.path}.1")
                self.reopen()

    def reopen(self) -> None:
        """Reopen the file, for log rotation. If stdout or stderr are the same file, reopen them too.

        Raises:
            LogError: the file cannot be opened; the old file stays in use.
        """
        if self.path is None:
            return
        fd = open_log(self.path)
        try:
            for other in (1, _STDERR):
                if is_same_file(other, self.fd):
                    os.dup2(fd, other)
            os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Write the remaining lines, for a second at most. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            if self._dropped:
                self._put(b"")  # writes the number of dropped lines
            with self._ready:
                self._closing = True
                self._ready.notify()
            thread.join(_CLOSE_S)
        super().close()

    def fail(self, message: str) -> None:
        """Report an error that ends regd: in the log, and on stderr if that is a different file."""
        self.close()
        message = visible(message)
        write_line(self.fd, self.lines.failure(message))
        if self.path is not None and not is_same_file(_STDERR, self.fd):
            write_line(_STDERR, f"regd: {message}")


def is_same_file(one: int, other: int) -> bool:
    """Return whether two descriptors refer to the same file."""
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:
        return False


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal that has not hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
