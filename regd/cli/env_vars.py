"""The one mapping from services to environment variables. Must not know who asks for them.

For `shop.db`: SHOP_DB_HOST, SHOP_DB_PORT, and SHOP_DB_ADDRESS, which is HOST:PORT. The values need no quotes in a
shell: hosts are letters, digits and a few signs that mean nothing there.
"""

from __future__ import annotations

from regd_client.wire import joined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any


def prefix(name: str) -> str:
    """Return what a service's variables begin with: capitals, digits and `_`."""
    made = "".join(each.upper() if each.isascii() and each.isalnum() else "_" for each in name)
    return f"_{made}" if made[:1].isdigit() else made


def variables(instances: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """Return the variables of the first instance of each name, and the names whose variables another one has."""
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    hidden: list[str] = []
    for each in instances:
        begins, name = prefix(each["name"]), each["name"]
        if begins not in owners:
            owners[begins] = name
            found[f"{begins}_HOST"] = each["host"]
            found[f"{begins}_PORT"] = str(each["port"])
            found[f"{begins}_ADDRESS"] = joined(each["host"], each["port"])
        elif owners[begins] != name and name not in hidden:
            hidden.append(name)
    return found, hidden
