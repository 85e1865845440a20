"""What a registry holds on disk: the file with the journal's lines applied, as a start would find it."""

from pathlib import Path

from regd.core.model import Entry, key_text
from regd.storage.files import Files
from regd.storage.store import peek


def stored(path: Path, files: Files | None = None) -> dict[str, Entry]:
    """Return the entries on disk by NAME or NAME/INSTANCE."""
    return {key_text(entry.key): entry for entry in peek(path, files or Files()).entries}
