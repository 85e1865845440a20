"""What a registry holds on disk: the file with the journal's lines applied, as a start would find it."""

from pathlib import Path

from regd.core.model import Entry, key_text
from regd.storage.document import parse
from regd.storage.files import Files
from regd.storage.journal import Journal
from regd.storage.recovery import Recovery, recover


def recovered(path: Path) -> Recovery:
    """Read a registry without locking it."""
    files = Files()
    segments = Journal(path.with_suffix(".journal"), files).find()
    document = parse(path.read_bytes(), 0.0) if path.exists() else None
    return recover(document, segments, path, 1_000)


def stored(path: Path) -> dict[str, Entry]:
    """Return the entries on disk by NAME or NAME/INSTANCE."""
    return {key_text(entry.key): entry for entry in recovered(path).entries}
