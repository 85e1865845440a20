"""A registry for other people's tests, and the pytest fixtures `regd` and `regd_in_process`.

    with regd.testing.running() as registry:  # the daemon in a process of its own
        ...
    with regd.testing.in_process.running() as registry:  # in a thread of this process
        ...

The modules are imported when they are first used, because every pytest imports this one where regd is installed.
"""

TYPE_CHECKING = False  # as in typing, whose import takes longer
if TYPE_CHECKING:
    from regd.testing import in_process
    from regd.testing.host_process import HostError
    from regd.testing.registry import Registry, running

__all__ = ["HostError", "Registry", "in_process", "running"]


if not TYPE_CHECKING:  # or a checker would take every name for a good one

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
