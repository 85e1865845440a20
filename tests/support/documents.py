"""Read the fenced blocks of the documents, and replay the conversations in them."""

import re
from pathlib import Path

from tests.support.daemon import InLoop, Peer


def blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def fits(expected: str, line: str) -> bool:
    """True if a line matches the document's, in which … matches any text."""
    return re.fullmatch(".*".join(map(re.escape, expected.split("…"))), line) is not None


async def replay(text: str, daemon: InLoop) -> None:
    """Send the lines marked `> ` and compare the replies with the lines marked `< `.

    `< (closed)` means that the daemon closes the connection; `2>` and `2<` belong to a second connection.
    """
    peers: dict[str, Peer] = {}
    for line in text.splitlines():
        match = re.fullmatch("([0-9]?)([<>]) (.*)", line)
        assert match, f"neither sent nor received: {line!r}"
        number, direction, content = match.groups()
        if number not in peers:
            peers[number] = await daemon.peer()
        peer = peers[number]
        if direction == ">":
            peer.send(content.replace("\\0", "\0"))
        elif content == "(closed)":
            assert await peer.rest() == b""
        else:
            reply = (await peer.line()).decode().rstrip("\n")
            assert fits(content, reply), f"\nexpected {content}\nreceived {reply}"
