"""The async client of regd, the service registry: register services, and find them by name.

    async with regd_client.register("runner", 5050):
        endpoint = await regd_client.resolve("db")
        reader, writer = await asyncio.open_connection(*endpoint.address)

It needs the standard library only. The modules that import asyncio are loaded when one of the package's names is
first used, so a command that needs only `regd_client.blocking_connection` starts quickly.
"""

from typing import TYPE_CHECKING

from regd_client.errors import BadArgument, Conflict, Denied, NotFound, RegdError, Timeout, Unavailable
from regd_client.version import VERSION

if TYPE_CHECKING:
    from regd_client.api import deregister, mirror, register, resolve, resolve_all, watch
    from regd_client.client import Client
    from regd_client.lifespans import RegisteredSocket, lifespan, listen
    from regd_client.mirrors import Mirror
    from regd_client.models import Endpoint, Event
    from regd_client.registration import Registration

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

__version__ = VERSION

# No module may have one of these names: importing it would replace the function or class by the module.
_MODULES = {
    "Client": "client",
    "Endpoint": "models",
    "Event": "models",
    "Mirror": "mirrors",
    "RegisteredSocket": "lifespans",
    "Registration": "registration",
    "deregister": "api",
    "lifespan": "lifespans",
    "listen": "lifespans",
    "mirror": "api",
    "register": "api",
    "resolve": "api",
    "resolve_all": "api",
    "watch": "api",
}


if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'regd_client' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"regd_client.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
