"""OPTIONS lists every option and environment variable, and no other."""

import ast
import re
from collections.abc import Iterator

import pytest

from regd.cli import manual
from regd.testing import plugin
from tests.support.daemon import ROOT

TEXT = (ROOT / "regd" / "OPTIONS.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
FLAG = re.compile(r"--[a-z-]+")


def rows(title: str) -> list[list[str]]:
    """Return the cells of all table rows in a section, without the heads."""
    lines = [line for line in SECTIONS[title].splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def man_page(name: str) -> str:
    """Return a man page without the escapes of roff."""
    return re.sub(r"\\f[BIR]", "", manual.page(name)).replace(r"\-", "-")


def part(page: str, title: str) -> str:
    """Return one section of a man page, up to the next one."""
    found = re.search(rf"^\.S[HS] {title}\n(.*?)(?=^\.S[HS] |\Z)", page, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def terms(text: str) -> list[str]:
    """Return what a section of a man page explains: each option or variable."""
    return re.findall(r"^\.TP\n(.*)", text, re.MULTILINE)


def flags(text: str) -> set[str]:
    return {flag for term in terms(text) for flag in FLAG.findall(term)}


def test_options_of_regd() -> None:
    assert {flag for row in rows("regd") for flag in FLAG.findall(row[0])} == flags(
        part(man_page("regd"), "OPTIONS")
    )


def test_options_of_every_command() -> None:
    page = man_page("regctl")
    common = [row for row in rows("regctl") if len(row) == 3]
    assert {flag for row in common for flag in FLAG.findall(row[0])} == flags(part(page, "OPTIONS"))
    told = {
        (command, flag)
        for row in rows("regctl")
        if len(row) == 4
        for command in re.findall(r"`([a-z]+)`", row[1])
        for flag in FLAG.findall(row[0])
    }
    commands = re.findall(r"^\.SS ([a-z]+)", page, re.MULTILINE)
    assert len(commands) > 15
    assert told == {(command, flag) for command in commands for flag in flags(part(page, command))}


# Defaults that the man page leaves out, or puts into other words.
NO_VALUE = {"", "none", "off", "never", "unchanged", "stderr"}


def explanations(text: str) -> dict[str, str]:
    """Return the explanation of each option in a section of a man page."""
    explained = re.findall(r"^\.TP\n(--[a-z-]+)[^\n]*\n([^\n]*)", text, re.MULTILINE)
    return {flag: explanation.replace(r"\(dq", '"') for flag, explanation in explained}


def test_defaults_of_regd() -> None:
    explained = explanations(part(man_page("regd"), "OPTIONS"))
    values = {row[0].split()[0].strip("`"): row[1].strip("`") for row in rows("regd")}
    checked = {flag: value for flag, value in values.items() if value not in NO_VALUE and " " not in value}
    assert len(checked) >= 4
    for flag, value in checked.items():
        assert f"default: {value}" in explained[flag], flag


def test_defaults_of_every_command() -> None:
    page, count = man_page("regctl"), 0
    for option, commands, default, _ in (row for row in rows("regctl") if len(row) == 4):
        flag, value = option.split()[0].strip("`"), default.strip("`")
        for command in re.findall(r"`([a-z]+)`", commands):
            if value not in NO_VALUE:
                assert f"default: {value})" in explanations(part(page, command))[flag], (command, flag)
                count += 1
    assert count >= 8


def variables(title: str) -> set[str]:
    return {name for row in rows(title) for name in re.findall(r"`([A-Z_]+)`", row[0])}


@pytest.mark.parametrize("name", ["regd", "regctl"])
def test_variables_of_the_man_pages(name: str) -> None:
    of_page = {name for term in terms(part(man_page(name), "ENVIRONMENT")) for name in term.split(", ")}
    assert of_page
    read, given = (
        variables("Environment variables that are read"),
        variables("Environment variables that are set"),
    )
    assert of_page <= read | given


def read_variables() -> Iterator[str]:
    """Yield the names that the programs look up in a mapping called environ or environment."""
    for folder in ("regd", "client"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(value=mapping, attr="get" | "pop"), args=[ast.Constant(str(name)), *_]
                    ) if "environ" in ast.unparse(mapping):
                        yield name


def test_variables_that_the_programs_read() -> None:
    found = set(read_variables())
    assert {"REGD_ADDRESS", "STATE_DIRECTORY", "NOTIFY_SOCKET"} <= found
    # These are of others, and are taken away from a child process.
    ours = found - {"LISTEN_PIDFDID", "PYTHONPATH"}
    assert ours <= variables("Environment variables that are read")


def test_settings_of_pytest() -> None:
    class Parser:
        def __init__(self) -> None:
            self.names: set[str] = set()

        def addini(self, name: str, *rest: object, **more: object) -> None:
            self.names.add(name)

    parser = Parser()
    plugin.pytest_addoption(parser)  # type: ignore[arg-type]
    assert {row[0].strip("`") for row in rows("pytest")} == parser.names
