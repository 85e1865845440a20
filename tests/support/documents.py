"""Read the fenced blocks of the documents, and replay their conversations."""

import re
from pathlib import Path

from tests.support.daemon import InLoop, Peer


def blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def fits(expected: str, line: str) -> bool:
    """Whether a line is as the document has it; … stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, expected.split("…"))), line) is not None


async def replay(text: str, daemon: InLoop) -> None:
    """Send the lines behind `> `, and hold what comes back against those behind `< `; `< (closed)` is the end.

    `2>` and `2<` are of another peer.
    """
    peers: dict[str, Peer] = {}
    for line in text.splitlines():
        found = re.fullmatch("([0-9]?)([<>]) (.*)", line)
        assert found, f"neither sent nor received: {line!r}"
        number, mark, said = found.groups()
        if number not in peers:
            peers[number] = await daemon.peer()
        peer = peers[number]
        if mark == ">":
            peer.send(said.replace("\\0", "\0"))
        elif said == "(closed)":
            assert await peer.rest() == b""
        else:
            came = (await peer.line()).decode().rstrip("\n")
            assert fits(said, came), f"\nexpected {said}\n    came {came}"
