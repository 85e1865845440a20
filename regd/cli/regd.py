"""The command `regd`: flags, logs, signals, and one line for whatever goes wrong."""

import argparse
import asyncio
import contextlib
import errno
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import regd
from regd.cli.commands import Parameter
from regd.cli.daemonize import (
    Background,
    Foreground,
    close_inherited_files,
    open_standard_files,
    take_signals,
)
from regd.cli.log_output import FORMATS, LogError, LogOutput, escaped, has_terminal, say
from regd.server.daemon import DEFAULT_GRACE_S, DEFAULT_PORT, Config, Daemon, default_registry
from regd.storage.store import StorageError
from regd.system.clock import LoopClock
from regd.system.listener import InheritedSocket, ListenError
from regd.system.open_files import fit_limits
from regd.system.peer_credentials import ALL_USERS, unmapped_uid
from regd.system.systemd import Notifier, Watchdog, handed_over, watchdog_s

log = logging.getLogger("regd")

_SWITCH_S = 0.0005
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_GARBAGE = 10_000  # objects, until somebody looks for cycles among them: there are none
_LARGE_BYTES = 32_768
_OFF = "off"
# These end a process by default. Timers that the caller has set go on in a program that it becomes (execve(2)).
_IGNORED = ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"regd: {escaped(message)} (see regd --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            print(message, end="", file=file or sys.stderr, flush=True)
        except OSError as error:
            if file is not sys.stdout:
                sys.stderr = None  # the interpreter would try once more at its end
                return
            sys.stdout = None
            if error.errno == errno.EPIPE:
                self.exit(0)
            self.exit(1, f"regd: cannot write to stdout: {error.strerror}\n")


def _port(text: str) -> int | str:
    if text == _OFF:
        return text
    if not text.isascii() or not text.isdigit() or len(text) > 5 or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, or off, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"must be 0 to 86400 seconds, not {text!r}")
    return seconds


def _idle_seconds(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 1:
        raise argparse.ArgumentTypeError(f"must be 1 to 86400 seconds, not {text!r}")
    return seconds


def _uid(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) >= ALL_USERS:
        raise argparse.ArgumentTypeError(f"must be the number of a user, as `id -u` shows it, not {text!r}")
    return int(text)


DOC = "The service registry of this machine: register names, resolve them."
STATUSES = {
    0: "ended by a signal, as asked, or with --idle-exit because nobody needs it",
    1: "cannot start, or cannot go on: stderr says why",
    2: "bad usage",
}
FLAGS = (
    Parameter(
        "--port",
        "TCP port on 127.0.0.1 and ::1; 0 picks a free one, off listens on no TCP "
        f"(default: {DEFAULT_PORT}, or the sockets that systemd hands over, in place of --port and --unix)",
        type=_port,
        metavar="PORT",
    ),
    Parameter("--unix", "listen on a Unix socket too, for this user alone", type=Path, metavar="PATH"),
    Parameter(
        "--registry",
        "the registry's file (default: registry.json in $STATE_DIRECTORY, $XDG_STATE_HOME/regd or "
        "~/.local/state/regd)",
        type=Path,
        metavar="PATH",
    ),
    Parameter(
        "--grace",
        "how long, after a restart, what connections held waits for them to come back "
        f"(default: {DEFAULT_GRACE_S:g})",
        type=_seconds,
        default=DEFAULT_GRACE_S,
        metavar="SECONDS",
    ),
    Parameter(
        "--allow-uid",
        "let this user write over TCP, besides root and the one that regd runs as; may be given again",
        type=_uid,
        action="append",
        default=[],
        metavar="UID",
    ),
    Parameter(
        "--allow-any-user",
        "let every user of this machine write: for a system that does not say whose a TCP connection is",
        action="store_true",
    ),
    Parameter(
        "--idle-exit",
        "end when nothing is registered and nobody connected for so long, as one does that was started by "
        "REGD_AUTOSTART=1 (default: stay)",
        type=_idle_seconds,
        metavar="SECONDS",
    ),
    Parameter(
        "--log",
        "append the log to this file instead of writing it to stderr; SIGHUP opens it anew",
        type=Path,
        metavar="PATH",
    ),
    Parameter(
        "--background",
        "once it listens, go on in the background, in a session of its own; needs --log",
        action="store_true",
    ),
    Parameter(
        "--log-level",
        "how much is logged; info has a line for each service that comes or goes, each conflict and each denial, "
        "debug for each request too (default: info)",
        type=str.lower,
        choices=("debug", "info", "warning", "error"),
        default="info",
    ),
    Parameter(
        "--log-format",
        "json: one JSON object a line (default: text)",
        choices=tuple(FORMATS),
        default="text",
    ),
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="regd",
        description=DOC,
        epilog='Probe it: echo \'{"cmd":"help"}\' | nc 127.0.0.1 7343',
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"regd {regd.__version__}")
    for flag in FLAGS:
        flag.add_to(parser)
    given = parser.parse_args(argv)
    if given.background and given.log is None:
        parser.error("--background needs --log, or nobody hears of it again")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon and return its exit status.

    0 after a signal, or when nobody needs it, 1 when it cannot start, 2 for bad usage. What a service manager
    says in the environment is heard, and taken out of it. A stdout or log that cannot be written changes nothing.
    """
    open_standard_files()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have what its encoding lacks
    given = _arguments(argv)
    output = None
    try:
        config = _config(given)
        if given.background:
            close_inherited_files([each.file for each in config.inherited if isinstance(each, InheritedSocket)])
        output = LogOutput(config.log, given.log_format)
        starter = Background(output.fd) if given.background else Foreground()
        take_signals()
        output.start(given.log_level)
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # its warnings are of peers that went away
        _give_memory_back()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(config, starter, output))
    except (ListenError, StorageError, LogError, _Misused) as error:
        if output is None:
            say(2, f"regd: {escaped(str(error))}")
        else:
            output.fail(str(error))
        return 2 if isinstance(error, _Misused) else 1
    except KeyboardInterrupt:  # before the handler stood
        return 130
    except Exception:
        log.critical("regd ends: this is a bug", exc_info=True)
        return 1
    finally:
        if output is not None:
            output.close()
    return 0


class _Misused(Exception):
    """Flags, and what a service manager hands over, that do not go together."""


def _config(given: argparse.Namespace) -> Config:
    registry, unix, log_path = (
        _absolute(flag, path)
        for flag, path in (("--registry", given.registry), ("--unix", given.unix), ("--log", given.log))
    )
    handed = handed_over(os.environ)
    for flag, value in (("--port", given.port), ("--unix", given.unix)):
        if handed and value is not None:
            raise _Misused(f"{flag} {value}: what to listen on was handed over already; leave the flag out")
    if given.port == _OFF and unix is None:
        raise _Misused("--port off: there is nothing to listen on; name a Unix socket with --unix PATH")
    unmapped = unmapped_uid()
    if unmapped in given.allow_uid:
        raise _Misused(
            f"--allow-uid {unmapped}: here that number is shared by all users without a mapping in "
            "/proc/self/uid_map; map the user and name its number in this namespace"
        )
    return Config(
        registry=registry or default_registry(os.environ),
        port=DEFAULT_PORT if given.port is None else None if given.port == _OFF else given.port,
        unix=unix,
        inherited=handed,
        grace_s=given.grace,
        allowed_uids=given.allow_uid,
        allow_any_user=given.allow_any_user,
        idle_exit_s=given.idle_exit,
        log=log_path,
    )


def _absolute(flag: str, path: Path | None) -> Path | None:
    """Return the path of a flag from the root on.

    Raises:
        StorageError: it names no file, or the current folder is gone.
    """
    if path is None:
        return None
    if path.parts[:1] == ("~",):
        raise StorageError(f"{flag} {path}: the shell left ~ as it is; write the home folder out")
    try:
        path = path.absolute()
    except OSError as error:
        raise StorageError(
            f"{flag} {path} is relative, and the current folder cannot be found ({error.strerror}); "
            "name a path from / on, or change the folder"
        ) from None
    if not path.name:
        raise StorageError(f"{flag} {path} is a folder; name a file in it")
    return path


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's, which comes with the extra `fast`, or None for asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _give_memory_back() -> None:
    """Have large pieces of memory go back to the system when they are free (mallopt(3); glibc alone has it).

    glibc keeps more the larger they were: after a siege of peers that do not read it was four times as much.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)


def _spare_the_old(phase: str, info: Mapping[str, int]) -> None:
    """Let a full collection of garbage look at nothing twice.

    With 100,000 registrations it would hold the loop for 70 ms. What has survived one is kept by somebody, and
    goes when nobody keeps it: regd leaves no cycles behind.
    """
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()


async def _run(config: Config, starter: Foreground, output: LogOutput) -> None:
    asked = asyncio.Event()
    _handle_signals(asked, output)
    # The thread that writes the file takes turns with the loop, which asks for one at every send and receive.
    sys.setswitchinterval(_SWITCH_S)
    clock = LoopClock()
    server = Daemon(replace(config, limits=fit_limits(config.limits)), clock=clock)
    gc.collect()
    gc.disable()  # what is loaded stays: nothing of it is worth a look, now or later
    await server.start()
    gc.freeze()
    gc.callbacks.append(_spare_the_old)
    gc.set_threshold(_GARBAGE, *gc.get_threshold()[1:])  # else a twentieth of all time goes into looking
    gc.enable()
    heart = Watchdog(Notifier(os.environ), clock, watchdog_s(os.environ), lambda: server.status)
    try:
        _announce(server.addresses)
        starter.leave()
        heart.start()
        await _until(asked, server)
    finally:
        heart.stop()
        await server.stop()


def _handle_signals(asked: asyncio.Event, output: LogOutput) -> None:
    """Have SIGTERM and SIGINT ask for the end, SIGHUP open the log anew, and others change nothing."""
    loop = asyncio.get_running_loop()

    def ask(number: signal.Signals) -> None:
        if asked.is_set():
            os._exit(128 + number)  # asked twice: leave at once
        log.info("%s: leaving", number.name)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, number)

    terminal = _Terminal()

    def hang_up() -> None:
        if not terminal.hung_up(output):
            _reopen(output)
        elif not asked.is_set():  # a shell and the kernel may both say so
            ask(signal.SIGHUP)

    loop.add_signal_handler(signal.SIGHUP, hang_up)
    for name in _IGNORED:
        other: signal.Signals | None = getattr(signal, name, None)
        if other is not None and signal.getsignal(other) in (signal.SIG_DFL, signal.SIG_IGN):
            loop.add_signal_handler(other, log.info, "%s: ignored", name)


class _Terminal:
    """The terminal that this process was started in, if any. To be made before SIGHUP has a handler."""

    def __init__(self) -> None:
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup has it
        self._ends = not ignored and has_terminal()

    def hung_up(self, output: LogOutput) -> bool:
        """Whether a SIGHUP means the end. With the log in a file it may not, so look for the terminal."""
        return self._ends and (output.path is None or not has_terminal())


def _reopen(output: LogOutput) -> None:
    if output.path is None:
        log.info("SIGHUP: ignored; there is no --log to open anew")
        return
    try:
        output.reopen()
    except LogError as error:
        log.error("SIGHUP: %s; writing on to the old file", error)
    else:
        log.info("SIGHUP: this log was opened anew")


def _announce(addresses: Sequence[str]) -> None:
    """Print where regd listens, in one write: who has read the first line may close the pipe."""
    try:
        print("\n".join(f"listening {escaped(each)}" for each in addresses), flush=True)
    except OSError as error:
        sys.stdout = None  # the interpreter would try once more at its end
        log.warning("cannot write to stdout: %s; listening on %s", error.strerror, ", ".join(addresses))


async def _until(asked: asyncio.Event, server: Daemon) -> None:
    """Wait until somebody asks for the end, or nobody needs it; a bug in the engine ends it too, loudly."""
    fail = asyncio.ensure_future(server.failed())
    ends = [asyncio.ensure_future(asked.wait()), asyncio.ensure_future(server.idled()), fail]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if fail.done():
            fail.result()
    finally:
        for each in ends:
            each.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
