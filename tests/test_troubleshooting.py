"""The page of troubles: each of its headings is said by the program, brought about here, and no other is meant."""

import re
from pathlib import Path

import pytest

from regd.cli import commands, regd
from tests.support import client_troubles, daemon_troubles
from tests.support.daemon import ROOT
from tests.support.documents import fits
from tests.support.scenes import Scene

PAGE = ROOT / "regd" / "TROUBLESHOOTING.md"
ENTRIES = re.findall(r"^### `([^\n]*)`\n\n(.*?)(?=^#|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
HEADINGS = [heading for heading, _ in ENTRIES]
PRODUCERS = daemon_troubles.says | client_troubles.says
FLAG = re.compile(r"(?<![a-z-])--[a-z-]+")
LINES_MAX = 5
FIXED_MIN = 10  # characters of a heading that do not vary: fewer would fit what is not meant


def test_every_heading_is_brought_about_and_the_other_way_round() -> None:
    assert len(set(HEADINGS)) == len(HEADINGS) == PAGE.read_text().count("\n### ")
    assert set(HEADINGS) ^ set(PRODUCERS) == set()
    assert not set(daemon_troubles.says) & set(client_troubles.says)


@pytest.mark.parametrize("heading", HEADINGS)
async def test_it_is_said(
    heading: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = await PRODUCERS[heading](Scene(tmp_path, monkeypatch, caplog, capsys))
    assert fits(heading, said), f"\nthe page {heading}\n  it is {said}"
    assert [each for each in HEADINGS if fits(each, said)] == [heading], f"whose is {said!r}?"


@pytest.mark.parametrize(("heading", "text"), ENTRIES, ids=HEADINGS)
def test_an_entry_is_short(heading: str, text: str) -> None:
    assert len(heading.replace("…", "").strip()) >= FIXED_MIN
    assert 2 <= len(text.strip().splitlines()) <= LINES_MAX


def test_the_commands_and_flags_of_the_page_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        regd.main(["--help"])
    known = set(FLAG.findall(capsys.readouterr().out))
    for command in commands.COMMANDS.values():
        known |= {each.name for each in (*commands.COMMON, *command.arguments) if each.is_option}
    text = PAGE.read_text().replace("not `--reg`", "")
    assert set(FLAG.findall(text)) <= known
    assert set(re.findall(r"`regctl ([a-z]+)", text)) <= set(commands.COMMANDS)
