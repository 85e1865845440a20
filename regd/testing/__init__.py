"""A registry for tests, and the pytest fixtures `regd` and `regd_in_process`.

    with regd.testing.running() as registry:  # the daemon in a process of its own
        ...
    with regd.testing.in_process.running() as registry:  # in a thread of this process
        ...

The modules are imported when they are first used, because every run of pytest imports this one if regd is
installed.
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
