"""Help and the man pages are complete, and valid for groff and man."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regd.cli import manual
from regd.cli.commands import COMMANDS, COMMON, PAGES, STATUSES
from regd.cli.regd import FLAGS
from tests.support.daemon import ROOT, environment


def ran(*argv: str, said: str = "", status: int = 0) -> str:
    done = subprocess.run(
        argv, input=said, env=environment(MANWIDTH="100", LC_ALL="C.UTF-8", COLUMNS="100"),
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    return done.stderr if status else done.stdout + done.stderr


def regctl(*argv: str, status: int = 0) -> str:
    return ran(sys.executable, "-m", "regd.cli.regctl", *argv, status=status)


def need(tool: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine")
    return tool


def shown(name: str) -> str:
    """Return a page as formatted by groff, in ASCII."""
    return ran(
        need("groff"), "-man", "-Tascii", "-P-c", "-P-b", "-P-o", "-P-u", "-rLL=100n", said=manual.page(name)
    )


@pytest.mark.parametrize("command", ["run", "env", "help"])
def test_help_command_prints_the_same_as_the_help_option(command: str) -> None:
    text = regctl("help", command)
    assert text == regctl(command, "--help")
    for line in COMMANDS[command].examples:
        assert line in text


def test_help_without_topic_and_of_an_unknown_topic() -> None:
    assert regctl("help") == regctl("--help")
    assert regctl("help", "resolv", status=2) == "regctl: no command 'resolv'; did you mean 'resolve'?\n"
    assert regctl("help", "\x1b", status=2).count("regctl help") == 1
    assert "\x1b" not in regctl("help", "\x1b", status=2)


def test_help_shows_the_folder_of_the_documents() -> None:
    assert regctl("help").endswith(f"\nDocuments: {ROOT}\n")
    assert "Documents:" not in regctl("help", "run")
    for name in PAGES:
        assert "share/doc/regd" in shown(name)


@pytest.mark.parametrize("name", PAGES)
def test_groff_reports_no_warning(name: str) -> None:
    assert ran(need("groff"), "-man", "-ww", "-z", said=regctl("manual", name)) == ""


@pytest.mark.parametrize("name", PAGES)
def test_commands_in_the_page_stay_ascii(name: str) -> None:
    """roff would turn a bare `-` into a hyphen and a bare `'` into a quotation mark, unusable in a shell."""
    assert re.findall(r"(?<!\\)-.*", manual.page(name)) == []
    assert re.findall(r".*['`^~].*", manual.page(name)) == []


@pytest.mark.parametrize("name", PAGES)
def test_man_shows_the_page(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.1"
    path.write_text(regctl("manual", name))
    text = ran(need("man"), "--warnings", "-l", str(path))
    if "has been minimized" in text:
        pytest.skip("the man of this machine shows no pages")
    assert text.startswith(f"{name.upper()}(1)")


@pytest.mark.parametrize("name", PAGES)
def test_mandoc_reports_no_warning(name: str) -> None:
    ran(need("mandoc"), "-Tlint", "-Wwarning", said=manual.page(name).replace('1 ""', '1 "January 1, 2026"'))


def test_page_of_regctl_is_complete() -> None:
    assert regctl("manual") == manual.page("regctl")
    text = shown("regctl")
    for name, command in COMMANDS.items():
        assert f"regctl {name}" in text
        assert _flat(command.doc) in _flat(text)
        assert _flat(command.more.replace("`", "")) in _flat(text)
        for argument in (*command.parameters, *COMMON):
            assert re.search(
                rf"^ +{re.escape(argument.name if argument.is_option else argument.options['metavar'])}\b",
                text,
                re.M,
            ), argument.name
            assert _flat(argument.doc) in _flat(text)
        for line in command.examples:
            assert f"    {line}\n" in text, line  # with ASCII quotes and dashes, as it is typed
    statuses = _flat(text[text.index("EXIT STATUS") :])
    for status, means in STATUSES.items():
        assert f"{status} {means}" in statuses
    for part in ("ENVIRONMENT", "FILES", "EXIT STATUS", "EXAMPLES", "SEE ALSO"):
        assert f"\n{part}\n" in text
    assert "REGD_ADDRESS" in text


def test_page_of_regd_is_complete() -> None:
    text = shown("regd")
    for flag in (*(flag.name for flag in FLAGS), "--help", "--version"):
        assert f"\n       {flag}" in text
    for option in FLAGS:
        assert _flat(option.doc) in _flat(text)
    for part in ("ENVIRONMENT", "FILES", "EXIT STATUS", "SIGNALS", "EXAMPLES", "SEE ALSO"):
        assert f"\n{part}\n" in text
    assert """echo '{"cmd":"help"}' | nc 127.0.0.1 7343\n""" in text


def _flat(text: str) -> str:
    return " ".join(text.split())
