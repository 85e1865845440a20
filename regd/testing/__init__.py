"""A registry for tests, and the pytest fixtures `regd` and `regd_in_process`.

    with regd.testing.running() as registry:  # the daemon runs in another process
        ...
    with regd.testing.in_process.running() as registry:  # the daemon runs in a thread of this process
        ...

If regd is installed, every pytest run imports this package. So the package imports its modules only when needed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regd.testing import in_process
    from regd.testing.host_process import HostError
    from regd.testing.registry import Registry, running

__all__ = ["HostError", "Registry", "in_process", "running"]


if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name == "in_process":
            from importlib import import_module

            return import_module("regd.testing.in_process")
        if name in __all__:
            from regd.testing import registry

            return getattr(registry, name)
        raise AttributeError(f"module 'regd.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
