"""The pytest plugin: the fixtures `regd` and `regd_in_process`. Reports of failed tests show their contents.

Every pytest run loads the plugin, so it imports the modules that start a registry only when a test needs one.
"""

import contextlib
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path
    from typing import Any

    from regd.testing.in_process import InProcessRegistry
    from regd.testing.registry import OwnRegistry, Registry

SCOPES = ("function", "class", "module", "package", "session", "run")
STORAGES = ("memory", "tmp_path")
_SHARED = "regd-shared"  # the name of the plugin for scope `run`, and the key of its registry in `workerinput`
_running: "list[Registry]" = []  # the registries of active fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "regd_scope",
        f"how long a registry of the fixture `regd` lives: {', '.join(SCOPES)}; "
        "`run` is one for all workers of pytest-xdist",
        default="function",
    )
    parser.addini(
        "regd_storage",
        f"where the fixture `regd` keeps its registry: {' or '.join(STORAGES)}",
        default="memory",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name, allowed in (("regd_scope", SCOPES), ("regd_storage", STORAGES)):
        value = config.getini(name)
        if value not in allowed:
            raise pytest.UsageError(f"{name} = {value}: take one of {', '.join(allowed)}")
    if config.getini("regd_scope") == "run" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Shared(config), _SHARED)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if spawn := sys.modules.get("regd.testing.host_process"):
        spawn.close_unused()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the host process in the background, if a test needs it."""
    config = session.config
    if config.getoption("collectonly") or config.getini("regd_scope") == "run":
        return
    if any(_wants(item) for item in session.items):
        from regd.testing.host_process import HostError, host

        with contextlib.suppress(HostError):  # the fixture reports it
            host()


def _wants(item: pytest.Item) -> bool:
    """Return whether a test uses this plugin's fixture `regd`, not another fixture of that name."""
    fixtures: dict[str, Any] = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    innermost = fixtures.get("regd", ())[-1:]
    return any(getattr(fixture.func, "__module__", "") == __name__ for fixture in innermost)


def _scope(fixture_name: str, config: pytest.Config) -> "Any":
    scope = config.getini("regd_scope")
    return "session" if scope == "run" else scope


@pytest.fixture(scope=_scope)
def regd(request: pytest.FixtureRequest) -> "Iterator[Registry]":
    """A private registry: a daemon on a free port. This process and its children find it by REGD_ADDRESS."""
    from regd.testing.host_process import HostError
    from regd.testing.registry import found_by_children

    with contextlib.ExitStack() as stack:
        try:
            registry = _open_registry(request, stack)
        except HostError as error:
            pytest.fail(str(error), pytrace=False)
        stack.enter_context(found_by_children(registry))
        if request.scope == "package":
            _end_with_package(request)
        _running.append(registry)
        stack.callback(_running.remove, registry)
        yield registry


@pytest.fixture
def regd_in_process() -> "Iterator[InProcessRegistry]":
    """A registry in this process, for unit tests. Clients find it by REGD_ADDRESS."""
    from regd.testing import in_process

    with in_process.running() as registry:
        _running.append(registry)
        yield registry
        _running.remove(registry)


def _open_registry(request: pytest.FixtureRequest, stack: contextlib.ExitStack) -> "Registry":
    from regd.testing.registry import OwnRegistry, Registry

    config = request.config
    if config.getini("regd_scope") != "run":
        registry = OwnRegistry(_path(request))
        stack.callback(registry.end)
        return registry
    address_and_path = getattr(config, "workerinput", {}).get(_SHARED)
    if address_and_path:
        return Registry(*address_and_path, shared=True)
    shared: _Shared | None = config.pluginmanager.get_plugin(_SHARED)
    assert shared is not None
    return shared.registry()


def _end_with_package(request: "Any") -> None:
    """End the fixture after the package of the test. pytest would wait for the package of the fixture."""
    package = request._pyfuncitem.getparent(pytest.Package)
    if package is not None:
        package.addfinalizer(lambda: request._fixturedef.finish(request))


def _path(request: pytest.FixtureRequest) -> "Path | None":
    if request.config.getini("regd_storage") == "memory":
        return None
    if request.scope == "function":
        folder: Path = request.getfixturevalue("tmp_path") / "regd"
    else:
        folder = request.getfixturevalue("tmp_path_factory").mktemp("regd")
    return folder / "registry.json"


class _Shared:
    """The plugin for scope `run`. It runs in the controller of pytest-xdist, or in the only process."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._registry: OwnRegistry | None = None

    def registry(self) -> "OwnRegistry":
        """Return the registry. The first call starts it."""
        if self._registry is None:
            from regd.testing.registry import OwnRegistry

            path = None
            if self._config.getini("regd_storage") == "tmp_path":
                # Outside of a test, pytest offers only this private attribute; pytest-xdist uses it too.
                path = self._config._tmp_path_factory.mktemp("regd") / "registry.json"  # type: ignore[attr-defined]
            self._registry = OwnRegistry(path, shared=True)
        return self._registry

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: "Any") -> None:
        from regd.testing.host_process import HostError

        try:
            registry = self.registry()
        except HostError as error:
            raise pytest.UsageError(str(error)) from None
        node.workerinput[_SHARED] = (registry.address, registry.path and str(registry.path))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the daemon's log to the report of a worker, which has no access to the log."""
        if hasattr(report, "node") and self._registry and any(title == "regd" for title, _ in report.sections):
            from regd.testing.host_process import HostError

            with contextlib.suppress(HostError):  # the worker has already reported that the host has ended
                report.sections.append(("regd logged", self._registry.logged()))

    def pytest_unconfigure(self) -> None:
        if self._registry is not None:
            self._registry.end()
            self._registry = None


@pytest.hookimpl(hookwrapper=True)  # not `wrapper=True`, which older versions of pytest do not support
def pytest_runtest_makereport(item: pytest.Item) -> "Generator[None, Any, None]":
    """Add the registries of a failed test to its report."""
    report = (yield).get_result()
    if report.failed and report.when != "teardown" and "regd.testing.registry" in sys.modules:
        for registry in _used_by(item):
            report.sections.append(("regd", registry.described()))


def _used_by(item: pytest.Item) -> "list[Registry]":
    """Return the registries of a test: those of this plugin's fixtures, and those that other fixtures return."""
    from regd.testing.registry import Registry

    arguments = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Registry)]
    # After a failed set-up, and with `getfixturevalue`, the registry is not in `funcargs`.
    named = getattr(getattr(item, "_request", None), "fixturenames", ())
    fixtures = {"regd", "regd_in_process"}.intersection(named)
    return [*dict.fromkeys([*arguments, *(_running if fixtures else ())])]
