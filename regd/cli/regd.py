"""The command `regd`: parses its flags, sets up the log and signals, and runs the daemon."""

import argparse
import asyncio
import contextlib
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import regd
from regd.cli.arguments import Parameter, Parser, UsageError, integer, port_or_off, seconds
from regd.cli.daemonize import close_inherited_files, fork_to_background, unblock_signals
from regd.cli.log_output import FORMATS, LogError, LogOutput, has_terminal, write_line
from regd.cli.output import Output, finish, open_standard_streams, visible
from regd.core.limits import DEFAULT
from regd.server.daemon import DEFAULT_GRACE_S, DEFAULT_PORT, Config, Daemon, default_registry
from regd.storage.store import StorageError
from regd.system.clock import LoopClock
from regd.system.listener import InheritedSocket, ListenError
from regd.system.open_files import fit_limits
from regd.system.peer_credentials import ALL_USERS, unmapped_uid
from regd.system.systemd import Notifier, Watchdog, take_inherited_sockets, watchdog_s
from regd_client import project
from regd_client.autostart import IDLE_EXIT_S, LOG_MIB

log = logging.getLogger("regd")

_SWITCH_INTERVAL_S = 0.0005
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
# Just above the 256 KiB that asyncio allocates for each read: with a lower threshold, each read would cost an
# mmap and a munmap. With 1 MiB, four times as much memory would remain allocated after many clients did not read
# their replies.
_LARGE_BYTES = 272 * 1_024
_GC_THRESHOLD = 10_000  # allocations between two collections; regd creates few cycles
_MIB = 1_048_576
# regd ignores these signals, each of which ends a process by default. SIGALRM may come from a timer that the
# parent set before execve(2). Not every system has all of them.
_IGNORED = (
    "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGSTKFLT",
    *(f"SIGRTMIN+{number}" for number in range(32)),
)  # fmt: skip


def _uid(text: str) -> int:
    uid = integer(text, 0, ALL_USERS - 1)
    if uid is None:
        raise argparse.ArgumentTypeError(f"must be the number of a user, as `id -u` shows it, not {text!r}")
    return uid


def _mebibytes(text: str) -> int:
    count = integer(text, 1, 1_048_576)
    if count is None:
        raise argparse.ArgumentTypeError(f"must be 1 to 1048576, not {text!r}")
    return count


DOC = "The service registry of this machine: register names, resolve them."
STATUSES = {
    0: "ended by a signal, or by --idle-exit",
    1: "cannot start or cannot continue: stderr says why",
    2: "bad usage",
}
FLAGS = (
    Parameter(
        "--port",
        "TCP port on 127.0.0.1 and ::1; 0 picks a free one, off: no TCP "
        f"(default: {DEFAULT_PORT}, or the sockets that systemd passes, in place of --port and --unix)",
        type=port_or_off,
        metavar="PORT",
    ),
    Parameter("--unix", "also listen on a Unix socket, for this user only", type=Path, metavar="PATH"),
    Parameter(
        "--registry",
        "the registry file (default: registry.json in $STATE_DIRECTORY, $XDG_STATE_HOME/regd or "
        "~/.local/state/regd)",
        type=Path,
        metavar="PATH",
    ),
    Parameter(
        "--project",
        "serve a project registry, the folder .regd that regctl init made, on its socket alone, with registry "
        "and log in it; exit after 300 s without connections and with static registrations only, or when the "
        "folder is removed (default: none)",
        type=Path,
        metavar="FOLDER",
    ),
    Parameter(
        "--grace",
        "after a restart, how long registrations held by connections wait for their clients to reconnect "
        f"(default: {DEFAULT_GRACE_S:g})",
        type=seconds(0, 86_400),
        default=DEFAULT_GRACE_S,
        metavar="SECONDS",
    ),
    Parameter(
        "--allow-uid",
        "let this user write over TCP, besides root and the user that regd runs as; repeatable",
        type=_uid,
        action="append",
        default=[],
        metavar="UID",
    ),
    Parameter(
        "--allow-any-user",
        "let every user of this machine write: for systems that cannot identify the user of a TCP connection",
        action="store_true",
    ),
    Parameter(
        "--idle-exit",
        "exit after this time without registrations and connections; a daemon started by REGD_AUTOSTART=1 has it "
        "(default: never)",
        type=seconds(1, 86_400),
        metavar="SECONDS",
    ),
    Parameter(
        "--history-mib",
        "keep this much of the journal, in MiB, as history; registry.json has what is older "
        f"(default: {DEFAULT.journal_bytes_max // _MIB})",
        type=_mebibytes,
        default=DEFAULT.journal_bytes_max // _MIB,
        metavar="N",
    ),
    Parameter(
        "--log",
        "append the log to this file instead of writing it to stderr; SIGHUP reopens it",
        type=Path,
        metavar="PATH",
    ),
    Parameter(
        "--log-mib",
        "with --log: when the log has this size, in MiB, keep it as PATH.1 and begin anew (default: never)",
        type=_mebibytes,
        metavar="N",
    ),
    Parameter(
        "--background",
        "continue in the background, in a new session, once regd listens; needs --log",
        action="store_true",
    ),
    Parameter(
        "--log-level",
        "least severe messages to log; info: one line for each service that comes or goes, each conflict and "
        "each denial, debug: one for each request too (default: info)",
        type=str.lower,
        choices=("debug", "info", "warning", "error"),
        default="info",
    ),
    Parameter(
        "--log-format",
        "json: one JSON object per line (default: text)",
        choices=tuple(FORMATS),
        default="text",
    ),
)


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="regd", description=DOC, epilog='Try it: echo \'{"cmd":"help"}\' | nc 127.0.0.1 7343')
    parser.add_argument("--version", action="version", version=f"regd {regd.__version__}")
    parser.add_parameters(FLAGS)
    arguments = parser.parse_args(argv)
    if arguments.background and arguments.log is None and arguments.project is None:
        parser.error("--background needs --log: nothing else can report a later failure")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon and return its exit status.

    0: ended by a signal or --idle-exit. 1: cannot start or continue. 2: bad usage. The variables of a service
    manager are removed from the environment. If stdout or the log cannot be written, the daemon continues.
    """
    open_standard_streams()
    Output.failure = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for paths that stdout's encoding cannot represent
    try:
        arguments = _read(argv)
    except UsageError as error:
        write_line(2, f"regd: {error}")
        return 2
    except SystemExit:  # after --help or --version
        return 0 if finish("regd") else 1
    return _serve(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    output = None
    try:
        config = _config(arguments)
        if arguments.background:
            close_inherited_files([item.file for item in config.inherited if isinstance(item, InheritedSocket)])
        output = LogOutput(config.log, arguments.log_format, (arguments.log_mib or 0) * _MIB)
        detach = fork_to_background(output.fd) if arguments.background else None
        unblock_signals()
        output.start(arguments.log_level)
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # no warnings about clients that disconnect
        _return_free_memory()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(config, detach, output))
    except (ListenError, StorageError, LogError, UsageError) as error:
        if output is None:
            write_line(2, f"regd: {visible(str(error))}")
        else:
            output.fail(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:  # before the signal handlers are set
        return 130
    except Exception:
        log.critical("regd ends: this is a bug", exc_info=True)
        return 1
    finally:
        if output is not None:
            output.close()
    return 0


def _use_project(arguments: argparse.Namespace) -> None:
    """Set the flags that --project implies.

    Raises:
        UsageError: the folder is not a project registry, or --project is used with a flag that it replaces.
    """
    folder = Path(os.path.realpath(arguments.project))
    if (why := project.fault(str(folder))) != "":
        why = why or "there is no such folder"
        raise UsageError("regd", f"--project {folder}: {why}; run `regctl init` in {folder.parent} first")
    for flag, value in (
        ("--port", arguments.port), ("--unix", arguments.unix), ("--registry", arguments.registry)
    ):  # fmt: skip
        if value is not None:
            raise UsageError("regd", f"{flag} {value}: a project registry has its own; leave the flag out")
    arguments.project = folder
    arguments.port, arguments.unix = "off", Path(project.socket_path(str(folder)))
    arguments.registry = folder / "registry.json"
    if arguments.idle_exit is None:
        arguments.idle_exit = IDLE_EXIT_S
    if arguments.background and arguments.log is None:
        arguments.log = folder / "regd.log"
        arguments.log_mib = arguments.log_mib or LOG_MIB


def _config(arguments: argparse.Namespace) -> Config:
    if arguments.project is not None:
        _use_project(arguments)
    registry = _absolute("--registry", arguments.registry)
    unix = _absolute("--unix", arguments.unix)
    log_path = _absolute("--log", arguments.log)
    inherited = take_inherited_sockets(os.environ)
    for flag, value in (("--port", arguments.port), ("--unix", arguments.unix)):
        if inherited and value is not None:
            raise UsageError(
                "regd", f"{flag} {value}: the service manager passes sockets to listen on; leave the flag out"
            )
    if arguments.port == "off" and unix is None:
        raise UsageError("regd", "--port off: no address to listen on; name a Unix socket with --unix PATH")
    unmapped = unmapped_uid()
    if unmapped in arguments.allow_uid:
        raise UsageError(
            "regd",
            f"--allow-uid {unmapped}: here all users without a mapping in /proc/self/uid_map share that number; "
            "map the user and pass its number in this namespace",
        )
    return Config(
        registry=registry or default_registry(os.environ),
        port=DEFAULT_PORT if arguments.port is None else None if arguments.port == "off" else arguments.port,
        unix=unix,
        inherited=inherited,
        grace_s=arguments.grace,
        allowed_uids=arguments.allow_uid,
        allow_any_user=arguments.allow_any_user,
        idle_exit_s=arguments.idle_exit,
        project=arguments.project,
        log=log_path,
        limits=replace(DEFAULT, journal_bytes_max=arguments.history_mib * _MIB),
    )


def _absolute(flag: str, path: Path | None) -> Path | None:
    """Return the absolute path of a flag's value.

    Raises:
        StorageError: the value is not the path of a file, or the current folder has been deleted.
    """
    if path is None:
        return None
    if path.parts[:1] == ("~",):
        raise StorageError(f"{flag} {path}: the shell did not expand ~; write out the home folder")
    try:
        path = path.absolute()
    except OSError as error:
        raise StorageError(
            f"{flag} {path} is relative, and the current folder cannot be found ({error.strerror}); "
            "pass an absolute path, or change to another folder"
        ) from None
    if not path.name:
        raise StorageError(f"{flag} {path} is a folder; name a file in it")
    return path


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop factory if uvloop (the extra `fast`) is installed; None for asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _return_free_memory() -> None:
    """Make malloc return large free blocks to the system (mallopt(3), glibc only).

    By default, glibc raises both thresholds when large blocks are freed, and so keeps more free memory.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)


def _freeze_survivors(phase: str, info: Mapping[str, int]) -> None:
    """After a full garbage collection, exclude the surviving objects from the next one.

    A full collection of 100,000 registrations takes 70 ms. Reference counting still frees these objects, since
    regd creates no long-lived cycles.
    """
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()


async def _run(config: Config, detach: Callable[[], None] | None, output: LogOutput) -> None:
    ending = asyncio.Event()
    _handle_signals(ending, output)
    # The event loop's thread releases the interpreter lock at every send and receive, and must not wait long to
    # get it back from the storage thread.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    clock = LoopClock()
    daemon = Daemon(replace(config, limits=fit_limits(config.limits)), clock=clock)
    gc.collect()
    gc.disable()  # while the registry is loaded, which creates no garbage
    await daemon.start()
    gc.freeze()
    gc.callbacks.append(_freeze_survivors)
    gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])  # the default threshold costs 5% of the CPU time
    gc.enable()
    watchdog = Watchdog(Notifier(os.environ), clock, watchdog_s(os.environ), lambda: daemon.status)
    try:
        _announce(daemon.addresses)
        if detach is not None:
            detach()
        watchdog.start()
        await _until_end(ending, daemon)
    finally:
        watchdog.stop()
        await daemon.stop()


def _handle_signals(ending: asyncio.Event, output: LogOutput) -> None:
    """Set `ending` on SIGTERM and SIGINT, reopen the log on SIGHUP, and ignore other signals."""
    loop = asyncio.get_running_loop()

    def end(number: signal.Signals) -> None:
        if ending.is_set():
            os._exit(128 + number)  # a second signal: exit at once
        log.info("%s: leaving", number.name)
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # under nohup(1)
    had_terminal = not ignored and has_terminal()

    def hang_up() -> None:
        # With --log, a SIGHUP means to reopen the log, unless the terminal is gone.
        terminal_is_gone = had_terminal and (output.path is None or not has_terminal())
        if not terminal_is_gone:
            _reopen(output)
        elif not ending.is_set():  # the shell and the kernel may both send SIGHUP
            end(signal.SIGHUP)

    loop.add_signal_handler(signal.SIGHUP, hang_up)
    for name in _IGNORED:
        word, _, above = name.partition("+")
        other = getattr(signal, word, 0) + int(above or 0)
        if other in signal.valid_signals() and signal.getsignal(other) in (signal.SIG_DFL, signal.SIG_IGN):
            loop.add_signal_handler(other, log.info, "%s: ignored", name)


def _reopen(output: LogOutput) -> None:
    if output.path is None:
        log.info("SIGHUP: ignored, since there is no --log to reopen")
        return
    try:
        output.reopen()
    except LogError as error:
        log.error("SIGHUP: %s; still writing to the old file", error)
    else:
        log.info("SIGHUP: log reopened")


def _announce(addresses: Sequence[str]) -> None:
    """Print the addresses in one write, since a reader may close the pipe after the first line."""
    Output.write("".join(f"listening {visible(address)}\n" for address in addresses), flush=True)
    if Output.failure is not None:
        log.warning("cannot write to stdout: %s; listening on %s", Output.failure.strerror, ", ".join(addresses))


async def _until_end(ending: asyncio.Event, daemon: Daemon) -> None:
    """Wait for a signal that ends the daemon, for --idle-exit, or until a project registry is removed.

    Raises:
        StorageError: another regd has taken over the registry.
        Exception: the daemon has failed, because of a bug.
    """
    failed = asyncio.ensure_future(daemon.failed())
    tasks = [asyncio.ensure_future(ending.wait()), asyncio.ensure_future(daemon.ended()), failed]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
