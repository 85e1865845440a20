"""The fuzz targets: functions of arbitrary bytes that raise only on a bug in regd.

`test_fuzz.py` runs them on the corpus and on inputs from hypothesis, `run.py` under atheris. The first line of a
session input is its plan, see `conversation.py`; the stream follows.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

from regd.core.errors import Code, Refused
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Op, State, key_text
from regd.protocol import messages
from regd.protocol.bare import Quit
from regd.protocol.commands import Request
from regd.protocol.messages import decode
from regd.protocol.parser import Problem, RequestParser
from regd.storage import journal_lines
from regd.storage.document import Document, Position, Unreadable, entry_line, file_chunks, parse
from regd.storage.history_pages import Query
from regd.storage.store import StorageError, Store, peek
from regd.testing.memory import MemoryFiles
from tests.long.fuzz import gateways, oracle
from tests.long.fuzz.conversation import BEFORE, Conversation, is_a_line
from tests.long.fuzz.oracle import Said
from tests.support.world import World, faked_system

# (a) The line splitter and reader.

SHORT = Limits(line_bytes_max=64)
_AROUND = len(b"\r\0\r")  # the end of a line
_QUEUED_BYTES = 64  # the most that a queued line counts beyond its length
NEXT = b'\n{"cmd":"ping","id":"next"}\n'


def reader(data: bytes) -> None:
    """The items of a stream do not depend on how it is split, and equal the oracle's."""
    plan, stream = planned(data)
    for limits in (DEFAULT, SHORT):
        whole = _items([stream], limits)
        assert _items(_cut(plan, stream), limits) == whole
        if len(stream) <= 400:
            assert _items([stream[at : at + 1] for at in range(len(stream))], limits) == whole
        said = list(oracle.understood(stream, limits.line_bytes_max))
        _same_items(whole, said)
        behind = _items([stream, NEXT], limits)
        assert behind == _items([stream + NEXT], limits)
        if any(expectation.ends is None for expectation in said):
            continue
        if not said or not said[-1].ends:
            assert behind[-1:] == [Request("ping", "next", {})]
        elif said[-1].kind != oracle.QUIT:
            assert behind == whole


def planned(data: bytes) -> tuple[bytes, bytes]:
    plan, _, stream = data.partition(b"\n")
    return plan, stream


def _cut(plan: bytes, stream: bytes) -> Iterator[bytes]:
    at = 0
    for size in plan:
        yield stream[at : at + size]
        at += size
    yield stream[at:]


def _items(pieces: Any, limits: Limits) -> list[object]:
    """Feed chunks, and return the items up to `quit`; a problem as its code, whether it is fatal, and its id."""
    source = RequestParser(limits)
    items: list[object] = []
    for piece in pieces:
        source.receive(piece)
        kept = limits.line_bytes_max + _AROUND + len(piece) + _QUEUED_BYTES * piece.count(b"\n")
        assert 0 <= source.waiting_bytes <= kept
        if not _drain(source, items):
            return items
        assert source.waiting_bytes <= limits.line_bytes_max + _AROUND
    source.end()
    if _drain(source, items):
        assert not source.has_lines
        assert not source.has_partial_line
        assert source.waiting_bytes == 0
    return items


def _drain(source: RequestParser, items: list[object]) -> bool:
    """Take the parsed items. Return False after `quit` or a fatal problem."""
    while (item := source.next()) is not None:
        if isinstance(item, Quit):
            items.append("quit")
            return False
        if isinstance(item, Request):
            items.append(item)
            continue
        assert isinstance(item, Problem)
        assert isinstance(item.refusal.code, Code)
        is_a_line(messages.error(item.refusal))
        code = "http" if item.reply else str(item.refusal.code)
        assert not item.reply or oracle.is_http_refusal(item.reply)
        items.append((code, item.fatal, item.refusal.details.get("id")))
        if item.fatal:
            assert not source.has_lines
            assert not source.has_partial_line
            assert source.waiting_bytes == 0
            return False
    return True


def _same_items(items: list[object], said: list[Said]) -> None:
    """Compare regd's items of a stream with the oracle's, one by one."""
    depends = next((at for at, expectation in enumerate(said) if expectation.ends is None), len(said))
    assert len(items) == len(said) or depends < len(said), (items, said)
    for item, expectation in zip(items[:depends], said[:depends], strict=True):
        if isinstance(item, Request):
            assert expectation.kind in (oracle.REQUEST, oracle.UNSURE), (item, expectation)
            _same_request(item, expectation)
        elif expectation.kind == oracle.QUIT:
            assert item == "quit"
        elif expectation.kind == oracle.STRANGER:
            assert item == (Code.BAD_REQUEST, True, None)
        elif expectation.kind != oracle.UNSURE:
            assert item == (expectation.kind, expectation.ends, expectation.id), (item, expectation)


def _same_request(request: Request, said: Said) -> None:
    if not said.cmd:
        return  # nested too deeply for the oracle
    assert (request.cmd, request.id, type(request.id)) == (said.cmd, said.id, type(said.id))
    assert said.arguments is not None
    arguments = dict(said.arguments)
    if "after" in arguments:
        arguments["after"] = arguments["after"].removesuffix("/")  # an omitted instance is the empty one
    assert _as_json(request.arguments) == arguments


def _as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as sent on the wire, where `after` is text."""
    return {name: key_text(value) if name == "after" else value for name, value in arguments.items()}


# (b) The decoder.


def decoder(data: bytes) -> None:
    """A line is a request or refused, as in the oracle; an encoded request is decoded to the same request."""
    source = data.replace(b"\n", b" ")
    try:
        request = decode(source)
    except Refused as refusal:
        is_a_line(messages.error(refusal))
        _refused_rightly(source, refusal)
        return
    _same_request(request, oracle.judged(source))
    fields = {"cmd": request.cmd, **_as_json(request.arguments)}
    if request.id is not None:
        fields["id"] = request.id
    for ascii in (True, False):
        again = decode(json.dumps(fields, ensure_ascii=ascii, allow_nan=False).encode("utf-8"))
        assert again == request
        assert type(again.id) is type(request.id)
    reply = is_a_line(messages.ok(request.id, {}))
    assert reply == ({"ok": True} if request.id is None else {"ok": True, "id": request.id})


def _refused_rightly(source: bytes, refusal: Refused) -> None:
    try:
        said = oracle.judged(source)
    except oracle.Bad as bad:
        said = Said(bad.code, id=bad.id)
    if said.kind in set(Code):
        assert (refusal.code, refusal.details.get("id")) == (said.kind, said.id), (refusal.message, said)
        return
    assert said.kind == oracle.UNSURE, (refusal.message, said)


# (c) The whole session.


def session(data: bytes) -> None:
    """Send a stream to a whole daemon. Only requests change something, and nothing is left afterwards."""
    plan, stream = planned(data)
    with faked_system():
        world = World(BEFORE)
        try:
            talk = Conversation(world)
            talk.run(plan, stream)
            talk.check()
        finally:
            world.stop()
        assert world.server._engine_task is not None
        assert world.server._engine_task.exception() is None
        assert not world.loop.errors, world.loop.errors
        assert not world.timers


# (d) The file.


def loader(data: bytes) -> None:
    """A file loads or is `Unreadable`. A loaded document equals json's, and loads the same after it is saved."""
    try:
        document = parse(data, 5.0)
    except Unreadable as error:
        why = str(error)
    else:
        _loads_again(data, document)
        return
    assert why
    assert why.isprintable()


def _loads_again(data: bytes, document: Document) -> None:
    top = json.loads(data, object_pairs_hook=_once)
    top.pop("$regd", None)
    assert [key_text(entry.key) for entry in document.entries] == list(top)
    for entry in document.entries:
        fields = top[key_text(entry.key)]
        assert type(fields["port"]) is int
        assert (entry.port, entry.meta) == (fields["port"], fields.get("meta", {}))
        assert (entry.host, entry.state) == (fields.get("host", "127.0.0.1"), fields.get("state", "ready"))
        assert entry.priority == fields.get("priority", 0)
        assert oracle.CHECKS["name"](entry.name)
        assert oracle.CHECKS["host"](entry.host) is not False
        assert oracle.CHECKS["meta"](entry.meta)
    position = document.position or Position("epoch", 1)
    written = b"".join(file_chunks(document.rev, position, [*map(entry_line, document.entries)]))
    assert written.isascii()
    assert written.count(b"\n") == len(document.entries) + 3
    assert parse(written, 5.0) == replace(document, position=position, edited=False)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs), "duplicate key"
    return dict(pairs)


# (e) The registry file and the journal.

SEPARATOR = b"\n--\n"
_PATH = Path("/r/registry.json")
_OPEN_CRC = re.compile(rb'(.*),"crc":"\*"\}')
_NUMBER_MAX = 2**62  # a damaged number that fits its checksum may leave no room for changes


def journal(data: bytes) -> None:
    """What a start finds is loaded or refused in one line. If nothing is forged, the next start finds the same.

    The parts are the registry file, empty if there is none, and the segments, the oldest first. A line with
    `"crc":"*"` at its end gets the right checksum. That can make a line that regd would not write, or segments
    in a wrong order, which damage cannot do. One start may not look at them, and the next one may refuse them.
    """
    registry, *segments = data.split(SEPARATOR)
    files = MemoryFiles()
    files.make_folder(_PATH.parent)
    if registry:
        _put(files, _PATH, registry)
    number, is_forged = 0, False
    for at, segment in enumerate(map(_with_checksums, segments), 1):
        first = _first_line(segment)
        number = max(number + 1, first or 0)
        is_forged = is_forged or _has_forged_line(segment) or (first is not None and first != number)
        _put(files, _PATH.with_name("registry.journal" + f".{number}" * (at < len(segments))), segment)
    before = _contents(files)
    store = Store(_PATH, _is_one_line, files, epoch="first")
    try:
        found = store.open(5.0)
    except StorageError as error:
        _is_one_line(str(error))
        assert _contents(files) == before
        return
    entries, rev = {key_text(entry.key): entry_line(entry) for entry in found.entries}, found.rev
    assert len(entries) == len(found.entries)
    if max(rev, found.line) >= _NUMBER_MAX:
        store.close()
        return
    store.begin()
    for query in (
        Query(rev, 100),
        Query(rev, 100, since=0),
        Query(rev, 100, after=1.0),
        Query(rev, 100, before=3),
    ):
        store.page(query)
    store.close()
    if is_forged:
        return
    again = Store(_PATH, _is_one_line, files, epoch="second")
    found = again.open(5.0)
    assert {key_text(entry.key): entry_line(entry) for entry in found.entries} == entries
    assert found.rev >= rev
    rev = found.rev
    again.begin()
    entry = Entry("after", "", "127.0.0.1", 1, {}, State.READY, rev + 1, 5.0)
    again.commit([Change(rev + 1, Op.UP, entry)])
    entries["after"] = entry_line(entry)
    recovered = peek(_PATH, files)
    assert ({key_text(entry.key): entry_line(entry) for entry in recovered.entries}, recovered.rev) == (
        entries,
        rev + 1,
    )
    again.close()


def _with_checksums(segment: bytes) -> bytes:
    lines = segment.split(b"\n")
    for at, text in enumerate(lines):
        if (found := _OPEN_CRC.fullmatch(text)) is not None:
            lines[at] = b'%s,"crc":"%08x"}' % (found[1], crc32(found[1]))
    return b"\n".join(lines)


def _first_line(segment: bytes) -> int | None:
    """Return the number in the head of a segment; None if the head is damaged, or a start refuses it."""
    with contextlib.suppress(journal_lines.Damaged):
        head = journal_lines.parse_head(segment.partition(b"\n")[0])
        return None if head is None else head.line
    return None


def _has_forged_line(segment: bytes) -> bool:
    """Return whether a line has the right checksum, but is not as regd writes it."""
    lines = segment.split(b"\n")[1:]
    return any(journal_lines.number_of(line) is not None and not _is_written_by_regd(line) for line in lines)


def _is_written_by_regd(line: bytes) -> bool:
    try:
        journal_lines.parse(line, 1, count(1))
    except journal_lines.Damaged:
        return False
    return True


def _put(files: MemoryFiles, path: Path, data: bytes) -> None:
    fd = files.create(path)
    files.write(fd, data)
    files.close(fd)


def _contents(files: MemoryFiles) -> dict[str, bytes]:
    return {name: files.read(_PATH.with_name(name)) for name in files.names(_PATH.parent) if ".lock" not in name}


def _is_one_line(text: str) -> None:
    assert text
    assert text.isprintable()


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "reader": reader,
    "decoder": decoder,
    "session": session,
    "loader": loader,
    "journal": journal,
    "dns": gateways.dns_message,
    "query": gateways.query,
    "events": gateways.events,
}
