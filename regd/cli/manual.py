"""The man pages regctl(1) and regd(1), in roff, from the tables that the programs read their command lines by.

Must not know what a command does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import regd
from regd.cli import commands
from regd.cli.arguments import Parameter
from regd.cli.commands import COMMANDS, COMMON, Subcommand

_HELP = Parameter("--help", "show how it is used, and do nothing else", action="help")
_VERSION = Parameter("--version", "show the version, and do nothing else", action="version")
_ASKED = {
    "REGD_ADDRESS": "Where the daemon is, when `--address` does not say so. Without both: tcp://127.0.0.1:7343.",
    "REGD_AUTOSTART": "With `1`, `true`, `yes` or `on` a daemon is started where none answers on this machine.",
}
_GIVEN = {
    "PORT": "For the command of `regctl run`: the port to listen on.",
    "LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES": "For the command of `regctl run --socket`: as in sd_listen_fds(3); "
    "the socket is file 3.",
    "NAME_HOST, NAME_PORT, NAME_ADDRESS": "Of each service that `regctl run --wait` has waited for, and what "
    "`regctl env` prints.",
}
_STATE = {
    "STATE_DIRECTORY": "The folder of `registry.json`, as systemd sets it.",
    "XDG_STATE_HOME": "Without that: `regd/registry.json` in this folder; without both in ~/.local/state.",
}
_TAKEN = {
    "SIGTERM, SIGINT": "End: no more requests are taken, the replies go out, and the registrations stay in "
    "their file.",
    "SIGHUP": "With `--log`: open that file anew, for log rotation. In a terminal that hangs up: end, unless "
    "started by nohup(1).",
    "SIGUSR1, SIGUSR2, SIGALRM": "Nothing but a line in the log.",
}
_PAGES = {
    "share/doc/regd": "The pages about regd, below the prefix of its installation; `regctl help` tells where.",
}
_RUN = {126: "`run`: the command cannot be run", 127: "`run`: the command is not there"}
_SIGNALS = {130: "Ctrl-C"}


def page(name: str) -> str:
    """Return the page of `regctl` or `regd`."""
    return "\n".join({"regctl": _regctl, "regd": _regd}[name]()) + "\n"


def _regctl() -> Iterator[str]:
    yield from _head("regctl", commands.DOC)
    yield from (
        ".SH SYNOPSIS",
        r"\fBregctl\fR [\fIOPTION\fR ...] \fICOMMAND\fR [\fIARGUMENT\fR ...]",
        ".SH DESCRIPTION",
        *_text(
            "regctl speaks to regd(1), the daemon that knows which service of this machine listens where. A pipe "
            "gets tabs between the columns, a terminal a table with a head."
        ),
        ".SH OPTIONS",
        *_text("These stand before the command or behind it."),
        *_listed((*COMMON, _HELP, _VERSION)),
        ".SH COMMANDS",
    )
    for name, command in COMMANDS.items():
        yield from _command(name, command)
    yield from (".SH ENVIRONMENT", *_terms(_ASKED | _GIVEN))
    yield from (".SH FILES", *_terms(_PAGES))
    yield from (".SH EXIT STATUS", *_terms(commands.STATUSES | _RUN | _SIGNALS))
    yield ".PP"
    yield from _text("`run` otherwise passes the status of its command on, and a signal that ended it.")
    yield from (".SH EXAMPLES", *_examples(line for command in COMMANDS.values() for line in command.examples))
    yield from (".SH SEE ALSO", r"\fBregd\fR(1)")


def _regd() -> Iterator[str]:
    from regd.cli import regd as daemon  # with all that it is made of

    yield from _head("regd", daemon.DOC)
    yield from (
        ".SH SYNOPSIS",
        rf"\fBregd\fR {' '.join(_short(each) for each in daemon.FLAGS)}",
        ".SH DESCRIPTION",
        *_text(
            "Programs register under a name the port that they listen on, others resolve the name. regd listens "
            "on loopback alone; once it does, it prints `listening tcp://127.0.0.1:7343` for each of its "
            "addresses. It speaks lines of JSON: `help` is for people. SIGTERM and Ctrl-C end it; what is "
            "registered is kept in its file."
        ),
        ".SH OPTIONS",
        *_listed((*daemon.FLAGS, _HELP, _VERSION)),
        ".SH ENVIRONMENT",
        *_terms(_STATE),
        ".SH FILES",
        *_terms(
            {"~/.local/state/regd/registry.json": "All registrations, one a line. Stop regd before editing it."}
            | _PAGES
        ),
        ".SH EXIT STATUS",
        *_terms(daemon.STATUSES | _SIGNALS),
        ".PP",
        *_text("Asked twice to end, it ends at once, with 128 and the number of the signal."),
        ".SH SIGNALS",
        *_terms(_TAKEN),
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
    yield from (".nh", ".ad l")  # what is to be typed is not cut
    yield ".SH NAME"
    yield rf"{name} \- {_plain(doc[:1].lower() + doc[1:].rstrip('.'))}"


def _command(name: str, command: Subcommand) -> Iterator[str]:
    words = [_short(each) for each in command.parameters]
    if command.runs:
        words.append(r"\fB\-\-\fR \fICOMMAND\fR [\fIARGUMENT\fR ...]")
    yield rf".SS {name}"
    yield " ".join((rf"\fBregctl {name}\fR", *words))
    yield ".PP"
    yield from _text(command.doc)
    if command.more:
        yield from (".PP", *_text(command.more))
    yield from _listed(command.parameters)


def _short(argument: Parameter) -> str:
    """Return how an argument stands in a synopsis."""
    shown = _shown(argument)
    how = argument.options.get("nargs")
    if not argument.is_option:
        return {"?": f"[{shown}]", "*": f"[{shown} ...]", "+": f"{shown} ..."}.get(str(how), shown)
    return f"[{shown} ...]" if how == "+" else f"[{shown}]"


def _shown(argument: Parameter) -> str:
    value = argument.options.get("metavar") or "|".join(argument.options.get("choices", ()))
    if not argument.is_option:
        return rf"\fI{_plain(value)}\fR"
    return rf"\fB{_plain(argument.name)}\fR" + (rf" \fI{_plain(value)}\fR" if value else "")


def _listed(arguments: Iterable[Parameter]) -> Iterator[str]:
    for each in arguments:
        yield from (".TP", _shown(each), *_text(each.doc))


def _terms(terms: Mapping[str, str] | Mapping[int, str]) -> Iterator[str]:
    for term, doc in terms.items():
        yield from (".TP", rf"\fB{_plain(str(term))}\fR", *_text(doc))


def _examples(lines: Iterable[str]) -> Iterator[str]:
    yield ".EX"
    for line in lines:
        yield f"    {_plain(line)}"
    yield ".EE"


def _text(text: str) -> Iterator[str]:
    """Yield a text; what stands between backquotes is bold."""
    parts = re.split("`([^`]*)`", text)
    made = "".join(rf"\fB{_plain(part)}\fR" if at % 2 else _plain(part) for at, part in enumerate(parts))
    yield rf"\&{made}" if made.startswith((".", "'")) else made


def _plain(text: str) -> str:
    r"""Return text that roff shows as it is: what is to be typed must not become typographic."""
    signs = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti", '"': r"\(dq"}
    return "".join(signs.get(each, each) for each in text)
