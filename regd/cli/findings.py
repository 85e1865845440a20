"""The result type of the checks of `regctl doctor`."""

from __future__ import annotations

from typing import Any, NamedTuple


class Finding(NamedTuple):
    """The result of a check: what was found, and what to do about it ("" if nothing is wrong)."""

    check: str
    found: str
    do: str = ""

    @property
    def ok(self) -> bool:
        return not self.do

    def as_json(self) -> dict[str, Any]:
        return {"check": self.check, "ok": self.ok, "found": self.found, "do": self.do}
