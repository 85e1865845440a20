"""The command `regd`: flags, logs, signals, and one line for whatever goes wrong."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import regd
from regd.cli.background import Background, Foreground, LogError, is_stderr, open_log
from regd.cli.commands import Argument
from regd.server.clock import LoopClock
from regd.server.lifecycle import DEFAULT_GRACE_S, DEFAULT_PORT, Config, Server, default_registry
from regd.server.listener import ListenError
from regd.server.systemd import Heart, Notices, handed_over, watchdog_s
from regd.storage.store import StorageError

log = logging.getLogger("regd")

_SWITCH_S = 0.0005
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_GARBAGE = 10_000  # objects, until somebody looks for cycles among them: there are none
_LARGE_BYTES = 32_768


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"regd: {message} (see regd --help)\n")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, not {text!r}")
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
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be the number of a user, as `id -u` shows it, not {text!r}")
    return int(text)


DOC = "The service registry of this machine: register names, resolve them."
STATUSES = {
    0: "ended by a signal, as asked, or with --idle-exit because nobody needs it",
    1: "cannot start, or cannot go on: stderr says why",
    2: "bad usage",
}
FLAGS = (
    Argument(
        "--port",
        f"TCP port on 127.0.0.1 and ::1; 0 picks a free one (default: {DEFAULT_PORT}, or the sockets that "
        "systemd hands over, in place of --port and --unix)",
        type=_port,
        metavar="PORT",
    ),
    Argument("--unix", "listen on a Unix socket too, for this user alone", type=Path, metavar="PATH"),
    Argument(
        "--registry",
        "the registry's file (default: registry.json in $STATE_DIRECTORY, $XDG_STATE_HOME/regd or "
        "~/.local/state/regd)",
        type=Path,
        metavar="PATH",
    ),
    Argument(
        "--grace",
        "how long, after a restart, what connections held waits for them to come back "
        f"(default: {DEFAULT_GRACE_S:g})",
        type=_seconds,
        default=DEFAULT_GRACE_S,
        metavar="SECONDS",
    ),
    Argument(
        "--allow-uid",
        "let this user write over TCP, besides root and the one that regd runs as; may be given again",
        type=_uid,
        action="append",
        default=[],
        metavar="UID",
    ),
    Argument(
        "--idle-exit",
        "end when nothing is registered and nobody connected for so long, as one does that was started by "
        "REGD_AUTOSTART=1 (default: stay)",
        type=_idle_seconds,
        metavar="SECONDS",
    ),
    Argument("--log", "append the log to this file instead of writing it to stderr", type=Path, metavar="PATH"),
    Argument(
        "--background",
        "once it listens, go on in the background, in a session of its own; needs --log",
        action="store_true",
    ),
    Argument(
        "--log-level",
        "how much is logged (default: info)",
        type=str.lower,
        choices=("debug", "info", "warning", "error"),
        default="info",
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
    says in the environment is heard, and taken out of it.
    """
    given = _arguments(argv)
    logged = None
    try:
        config = _config(given)
        logged = open_log(config.log) if config.log else None
        logging.basicConfig(
            level=given.log_level.upper(),
            format="%(asctime)s %(levelname)s %(message)s",
            stream=logged or sys.stderr,
        )
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # its warnings are of peers that went away
        starter = Background(logged) if given.background and logged else Foreground()
        _give_memory_back()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(config, starter))
    except (ListenError, StorageError, LogError, _Unheard, _Misused) as error:
        print(f"regd: {error}", file=sys.stderr)
        if logged and not is_stderr(logged):  # the person at the terminal, and whoever reads the log
            print(f"regd: {error}", file=logged)
        return 2 if isinstance(error, _Misused) else 1
    except KeyboardInterrupt:  # before the handler stood
        return 130
    return 0


class _Unheard(Exception):
    """Nobody can be told where regd listens."""


class _Misused(Exception):
    """A flag and what a service manager hands over cannot both be had."""


def _config(given: argparse.Namespace) -> Config:
    for flag, path in (("--registry", given.registry), ("--unix", given.unix), ("--log", given.log)):
        if path is not None and not path.absolute().name:
            raise StorageError(f"{flag} {path} is a folder; name a file in it")
    handed = handed_over(os.environ)
    for flag, value in (("--port", given.port), ("--unix", given.unix)):
        if handed and value is not None:
            raise _Misused(f"{flag} {value}: what to listen on was handed over already; leave the flag out")
    return Config(
        registry=(given.registry or default_registry(os.environ)).absolute(),
        port=DEFAULT_PORT if given.port is None else given.port,
        unix=given.unix.absolute() if given.unix else None,
        inherited=handed,
        grace_s=given.grace,
        allowed_uids=given.allow_uid,
        idle_exit_s=given.idle_exit,
        log=given.log.absolute() if given.log else None,
    )


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


async def _run(config: Config, starter: Foreground) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    def ask(number: signal.Signals) -> None:
        if asked.is_set():
            os._exit(128 + number)  # asked twice: leave at once
        log.info("%s: leaving", number.name)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, number)
    # The thread that writes the file takes turns with the loop, which asks for one at every send and receive.
    sys.setswitchinterval(_SWITCH_S)
    clock = LoopClock()
    server = Server(config, clock=clock)
    gc.collect()
    gc.disable()  # what is loaded stays: nothing of it is worth a look, now or later
    await server.start()
    gc.freeze()
    gc.callbacks.append(_spare_the_old)
    gc.set_threshold(_GARBAGE, *gc.get_threshold()[1:])  # else a twentieth of all time goes into looking
    gc.enable()
    heart = Heart(Notices(os.environ), clock, watchdog_s(os.environ), lambda: server.status)
    try:
        for address in server.addresses:
            _say(f"listening {address}")
        starter.leave()
        heart.start()
        await _until(asked, server)
    finally:
        heart.stop()
        await server.stop()


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError as error:
        sys.stdout = None  # the interpreter would try once more at its end
        raise _Unheard(
            f"cannot write to stdout: {error.strerror}; give it a place to say where it listens"
        ) from None


async def _until(asked: asyncio.Event, server: Server) -> None:
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
