"""A registry for other people's tests: a daemon in a process of its own, and pytest's fixture around it.

    with regd.testing.running() as registry:
        ...

What does it is imported when it is first used: every pytest where regd is installed comes by here.
"""

TYPE_CHECKING = False  # as in typing, whose import takes longer
if TYPE_CHECKING:
    from regd.testing.registry import Registry, running
    from regd.testing.spawn import HostError

__all__ = ["HostError", "Registry", "running"]


if not TYPE_CHECKING:  # or a checker would take every name for a good one

    def __getattr__(name: str) -> object:
        if name in __all__:
            from regd.testing import registry

            return getattr(registry, name)
        raise AttributeError(f"module 'regd.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
