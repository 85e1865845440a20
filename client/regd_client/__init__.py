"""The async client of regd, the service registry: register a service by name, find others by theirs.

    async with regd_client.register("runner", 5050):
        found = await regd_client.resolve("db")
        reader, writer = await asyncio.open_connection(found.host, found.port)

Standard library only. What needs asyncio is imported when it is first used, so that a command which needs only
`regd_client.blocking` starts quickly.
"""

from typing import TYPE_CHECKING, Any

from regd_client.errors import BadArgument, Conflict, NotFound, RegdError, Timeout, Unavailable

if TYPE_CHECKING:
    from regd_client.client import (
        Client,
        Endpoint,
        Registration,
        deregister,
        register,
        resolve,
        resolve_all,
    )

__all__ = [
    "BadArgument",
    "Client",
    "Conflict",
    "Endpoint",
    "NotFound",
    "RegdError",
    "Registration",
    "Timeout",
    "Unavailable",
    "deregister",
    "register",
    "resolve",
    "resolve_all",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from regd_client import client

        return getattr(client, name)
    raise AttributeError(f"module 'regd_client' has no attribute {name!r}")
