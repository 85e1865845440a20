"""`regctl manual`: the man pages regctl(1) and regd(1), in roff, from the tables of commands and flags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import regd
from regd.cli import commands
from regd.cli.arguments import Parameter
from regd.cli.commands import COMMANDS, COMMON, Subcommand

_HELP = Parameter("--help", "show a help message and exit", action="help")
_VERSION = Parameter("--version", "show the version and exit", action="version")
_READ_BY_REGCTL = {
    "REGD_ADDRESS": "The address of the daemon, unless `--address` is used. Default: the project registry "
    "of the current folder, else tcp://127.0.0.1:7343.",
    "REGD_AUTOSTART": "With `1`, `true`, `yes` or `on`, regctl starts a daemon if none answers on this machine; "
    "for a project registry it does so unless this is `0`, `false`, `no` or `off`.",
}
_SET_BY_REGCTL = {
    "PORT": "For the command of `regctl run`: the port to listen on.",
    "LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES": "For the command of `regctl run --socket`: as in sd_listen_fds(3); "
    "the socket is file descriptor 3.",
    "NAME_HOST, NAME_PORT, NAME_ADDRESS": "For the command of `regctl run --wait`: the address of each service; "
    "also printed by `regctl env`.",
}
_READ_BY_REGD = {
    "STATE_DIRECTORY": "The folder of `registry.json`, set by systemd.",
    "XDG_STATE_HOME": "If STATE_DIRECTORY is unset: the folder of `regd/registry.json`. Default: ~/.local/state.",
}
_SIGNALS_OF_REGD = {
    "SIGTERM, SIGINT": "Exit: regd sends outstanding replies first; registrations stay in the file.",
    "SIGHUP": "With `--log`: reopen the log file, for log rotation. When the terminal hangs up: exit, unless "
    "started by nohup(1).",
    "SIGUSR1, SIGUSR2, SIGALRM, SIGPWR": "Ignored, with a line in the log; so are real-time signals.",
}
_FILES_OF_REGCTL = {
    ".regd": "The registry of a project, which `regctl init` makes: `registry.json`, its journal, its log.",
    ".regd/serve": "The addresses of the project's `regctl serve`, one per line.",
}
_FILES = {
    "share/doc/regd": "The documents of regd, below the installation prefix; `regctl help` prints the path.",
}
_RUN = {126: "`run`: the command cannot be run", 127: "`run`: the command does not exist"}
_SIGNALS = {130: "Ctrl-C"}


def page(name: str) -> str:
    """Return the man page of `regctl` or `regd`."""
    return "\n".join({"regctl": _regctl, "regd": _regd}[name]()) + "\n"


def _regctl() -> Iterator[str]:
    yield from _head("regctl", commands.DOC)
    yield from (
        ".SH SYNOPSIS",
        r"\fBregctl\fR [\fIOPTION\fR ...] \fICOMMAND\fR [\fIARGUMENT\fR ...]",
        ".SH DESCRIPTION",
        *_text(
            "regctl is the command-line client of regd(1), the service registry of this machine. A terminal gets "
            "tables with a header, a pipe gets columns separated by tabs."
        ),
        ".SH OPTIONS",
        *_text("These can be written before or after the command."),
        *_described((*COMMON, _HELP, _VERSION)),
        ".SH COMMANDS",
    )
    for name, command in COMMANDS.items():
        yield from _command(name, command)
    yield from (".SH ENVIRONMENT", *_terms(_READ_BY_REGCTL | _SET_BY_REGCTL))
    yield from (".SH FILES", *_terms(_FILES_OF_REGCTL | _FILES))
    yield from (".SH EXIT STATUS", *_terms(commands.STATUSES | _RUN | _SIGNALS))
    yield ".PP"
    yield from _text("Otherwise `run` exits with the status of its command, or by the signal that ended it.")
    yield from (".SH EXAMPLES", *_examples(line for command in COMMANDS.values() for line in command.examples))
    yield from (".SH SEE ALSO", r"\fBregd\fR(1)")


def _regd() -> Iterator[str]:
    from regd.cli import regd as daemon  # imports asyncio and the daemon

    yield from _head("regd", daemon.DOC)
    yield from (
        ".SH SYNOPSIS",
        rf"\fBregd\fR {' '.join(map(_synopsis, daemon.FLAGS))}",
        ".SH DESCRIPTION",
        *_text(
            "Programs register the port on which they listen under a name; other programs resolve the name. regd "
            "listens on the loopback interface only, and prints a line such as `listening tcp://127.0.0.1:7343` "
            "for each of its addresses. The protocol is one JSON object per line; the request `help` describes "
            "it. Registrations are kept in a file."
        ),
        ".SH OPTIONS",
        *_described((*daemon.FLAGS, _HELP, _VERSION)),
        ".SH ENVIRONMENT",
        *_terms(_READ_BY_REGD),
        ".SH FILES",
        *_terms(
            {"~/.local/state/regd/registry.json": "All registrations, one per line. Stop regd before editing it."}
            | _FILES
        ),
        ".SH EXIT STATUS",
        *_terms(daemon.STATUSES | _SIGNALS),
        ".PP",
        *_text("A second signal ends regd at once, with status 128 plus the number of the signal."),
        ".SH SIGNALS",
        *_terms(_SIGNALS_OF_REGD),
        ".SH EXAMPLES",
        *_examples(
            (
                "regd",
                "regd --port off --unix /run/user/1000/regd.sock",
                "regd --port 0 --registry ./registry.json",
                'echo \'{"cmd":"help"}\' | nc 127.0.0.1 7343',
            )
        ),
        ".SH SEE ALSO",
        r"\fBregctl\fR(1)",
    )


def _head(name: str, doc: str) -> Iterator[str]:
    yield f'.TH {name.upper()} 1 "" "regd {regd.__version__}" "User Commands"'
    yield from (".nh", ".ad l")  # no hyphenation in commands
    yield ".SH NAME"
    yield rf"{name} \- {_plain(doc[:1].lower() + doc[1:].rstrip('.'))}"


def _command(name: str, command: Subcommand) -> Iterator[str]:
    words = list(map(_synopsis, command.parameters))
    if command.runs:
        words.append(r"\fB\-\-\fR \fICOMMAND\fR [\fIARGUMENT\fR ...]")
    yield rf".SS {name}"
    yield " ".join((rf"\fBregctl {name}\fR", *words))
    yield ".PP"
    yield from _text(command.doc)
    if command.more:
        yield from (".PP", *_text(command.more))
    yield from _described(command.parameters)


def _synopsis(parameter: Parameter) -> str:
    """Return a parameter as in the SYNOPSIS section of a man page."""
    shown = _shown(parameter)
    nargs = parameter.options.get("nargs")
    if not parameter.is_option:
        return {"?": f"[{shown}]", "*": f"[{shown} ...]", "+": f"{shown} ..."}.get(str(nargs), shown)
    return f"[{shown} ...]" if nargs == "+" else f"[{shown}]"


def _shown(parameter: Parameter) -> str:
    value = parameter.options.get("metavar") or "|".join(parameter.options.get("choices", ()))
    if not parameter.is_option:
        return rf"\fI{_plain(value)}\fR"
    return rf"\fB{_plain(parameter.name)}\fR" + (rf" \fI{_plain(value)}\fR" if value else "")


def _described(parameters: Iterable[Parameter]) -> Iterator[str]:
    for parameter in parameters:
        yield from (".TP", _shown(parameter), *_text(parameter.doc))


def _terms(terms: Mapping[str, str] | Mapping[int, str]) -> Iterator[str]:
    for term, doc in terms.items():
        yield from (".TP", rf"\fB{_plain(str(term))}\fR", *_text(doc))


def _examples(lines: Iterable[str]) -> Iterator[str]:
    yield ".EX"
    for line in lines:
        yield f"    {_plain(line)}"
    yield ".EE"


def _text(text: str) -> Iterator[str]:
    """Yield a text as roff, with the parts between backquotes in bold."""
    parts = re.split("`([^`]*)`", text)
    line = "".join(rf"\fB{_plain(part)}\fR" if at % 2 else _plain(part) for at, part in enumerate(parts))
    yield rf"\&{line}" if line.startswith((".", "'")) else line


def _plain(text: str) -> str:
    r"""Escape roff's special characters, so that commands can be copied from the page."""
    signs = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti", '"': r"\(dq"}
    return "".join(signs.get(letter, letter) for letter in text)
