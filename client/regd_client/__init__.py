"""The async client of regd, the service registry: register a service by name, find others by theirs.

    async with regd_client.register("runner", 5050):
        found = await regd_client.resolve("db")
        reader, writer = await asyncio.open_connection(found.host, found.port)

Standard library only. What needs asyncio is imported when it is first used, so that a command which needs only
`regd_client.blocking` starts quickly.
"""

from regd_client.errors import BadArgument, Conflict, Denied, NotFound, RegdError, Timeout, Unavailable

TYPE_CHECKING = False  # as in typing, whose import takes longer than many a command
if TYPE_CHECKING:
    from regd_client.api import deregister, mirror, register, resolve, resolve_all, watch
    from regd_client.client import Client
    from regd_client.listening import RegisteredSocket, listen
    from regd_client.mirrors import Mirror
    from regd_client.registration import Registration
    from regd_client.service import lifespan
    from regd_client.watches import Endpoint, Event

__all__ = [
    "BadArgument",
    "Client",
    "Conflict",
    "Denied",
    "Endpoint",
    "Event",
    "Mirror",
    "NotFound",
    "RegdError",
    "RegisteredSocket",
    "Registration",
    "Timeout",
    "Unavailable",
    "deregister",
    "lifespan",
    "listen",
    "mirror",
    "register",
    "resolve",
    "resolve_all",
    "watch",
]


if not TYPE_CHECKING:  # or a checker would take every name for a good one

    def __getattr__(name: str) -> object:
        if name in __all__:
            from regd_client import api, client, listening, mirrors, registration, service, watches

            for module in (api, client, registration, watches, mirrors, listening, service):
                if name in vars(module):
                    return vars(module)[name]
        raise AttributeError(f"module 'regd_client' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
