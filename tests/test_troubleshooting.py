"""TROUBLESHOOTING.md: the program produces each heading, and each message matches exactly one heading."""

import re
from pathlib import Path

import pytest

from regd.cli import commands, regd
from tests.support import client_troubles, daemon_troubles, gateway_troubles
from tests.support.daemon import ROOT
from tests.support.documents import fits
from tests.support.scenes import Scene

PAGE = ROOT / "regd" / "TROUBLESHOOTING.md"
ENTRIES = re.findall(r"^### `([^\n]*)`\n\n(.*?)(?=^#|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
HEADINGS = [heading for heading, _ in ENTRIES]
ALL_PRODUCERS = (daemon_troubles.says, client_troubles.says, gateway_troubles.says)
PRODUCERS = {heading: produce for says in ALL_PRODUCERS for heading, produce in says.items()}
FLAG = re.compile(r"(?<![a-z-])--[a-z-]+")
LINES_MAX = 5
FIXED_MIN = 10  # fixed characters of a heading; fewer would match other messages


def test_every_heading_has_a_producer_and_every_producer_a_heading() -> None:
    assert len(set(HEADINGS)) == len(HEADINGS) == PAGE.read_text().count("\n### ")
    assert set(HEADINGS) ^ set(PRODUCERS) == set()
    assert len(PRODUCERS) == sum(map(len, ALL_PRODUCERS))


@pytest.mark.parametrize("heading", HEADINGS)
async def test_program_says_the_heading(
    heading: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = await PRODUCERS[heading](Scene(tmp_path, monkeypatch, caplog, capsys))
    assert fits(heading, said), f"\nheading {heading}\nmessage {said}"
    assert [other for other in HEADINGS if fits(other, said)] == [heading], f"headings that match {said!r}"


@pytest.mark.parametrize(("heading", "text"), ENTRIES, ids=HEADINGS)
def test_entry_is_short(heading: str, text: str) -> None:
    assert len(heading.replace("…", "").strip()) >= FIXED_MIN
    assert 2 <= len(text.strip().splitlines()) <= LINES_MAX


def test_commands_and_options_of_the_page_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert regd.main(["--help"]) == 0
    known = set(FLAG.findall(capsys.readouterr().out))
    for command in commands.COMMANDS.values():
        known |= {argument.name for argument in (*commands.COMMON, *command.parameters) if argument.is_option}
    text = PAGE.read_text().replace("not `--reg`", "")
    assert set(FLAG.findall(text)) <= known
    assert set(re.findall(r"`regctl ([a-z]+)", text)) <= set(commands.COMMANDS)
