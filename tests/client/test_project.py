"""Project registries on values: which folder is used, what `init` creates, and when a client searches."""

import asyncio
import os
import pwd
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import regd_client
from regd_client import blocking, process_registration, project, protocol
from regd_client.arguments import RegistrationRequest
from regd_client.blocking_connection import BlockingConnection
from tests.support.daemon import InLoop

DEFAULT = protocol.DEFAULT_ADDRESS


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, which is the current folder. No address is in the environment, and no warning was logged."""
    for name in ("REGD_ADDRESS", "REGD_AUTOSTART"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(protocol, "_warned", set())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(parent: Path) -> Path:
    """Make a project registry, and return its folder."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(project.init(str(parent))[0])


def ignoring(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about ignored folders."""
    return [message for message in caplog.messages if " is ignored: " in message]


def found(start: Path) -> str | None:
    return project.search(str(start)).folder


# The search.


def test_nearest_folder_counts(home: Path) -> None:
    outer, inner = made(home / "work"), made(home / "work" / "shop")
    (home / "work" / "shop" / "src" / "deep").mkdir(parents=True)
    assert found(home / "work" / "shop" / "src" / "deep") == str(inner)
    assert found(home / "work" / "shop") == str(inner)
    assert found(home / "work") == str(outer)
    assert found(home) is None


def test_search_includes_the_home_folder_and_ends_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_home = made(home / "home")
    made(home)
    monkeypatch.setenv("HOME", str(home / "home"))
    (home / "home" / "work").mkdir()
    assert found(home / "home" / "work") == str(of_home)
    shutil.rmtree(of_home)
    assert found(home / "home" / "work") is None
    assert found(home) is not None  # outside the home folder, the root of the mount is the end


def test_search_includes_the_root_of_a_mount_and_ends_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_mount = made(home / "mnt")
    made(home)
    (home / "mnt" / "work").mkdir()
    original = os.stat

    def stat_as_if_mounted(path: str) -> object:
        result = original(path)
        if str(path).startswith(str(home / "mnt")):
            return os.stat_result((*result[:2], result.st_dev + 1, *result[3:10]))
        return result

    assert found(home / "mnt" / "work") == str(of_mount)
    shutil.rmtree(of_mount)
    assert found(home / "mnt" / "work") == str(home / ".regd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat_as_if_mounted)
        result = found(home / "mnt" / "work")
    assert result is None


def test_search_from_a_deleted_folder_finds_nothing(home: Path) -> None:
    made(home)
    (home / "deleted").mkdir()
    os.chdir(home / "deleted")
    (home / "deleted").rmdir()
    assert project.search() == project.Search(None)
    assert str(protocol.find_address()) == DEFAULT


def test_home_without_the_variable_is_from_the_password_database(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(("me", "", uid, 0, "", str(home), "")))
    made(home.parent)
    try:
        assert project.search().folder is None
    finally:
        shutil.rmtree(home.parent / ".regd")


# Why a folder is ignored. Each case changes a folder that would be used.


def replace_by_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def replace_by_copy(folder: Path) -> None:
    folder.rename(folder.with_name("original"))
    subprocess.run(["cp", "-a", str(folder.with_name("original")), str(folder)], check=True)


def replace_id(write: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "id").unlink()
        write(folder / "id")

    return change


def link_to_a_copy(path: Path) -> None:
    path.with_name("copy").write_text(f"{os.stat(path.parent).st_ino} 1 {path.parent}\n")
    path.symlink_to("copy")


BROKEN = "its file `id` is not as `regctl init` writes it"
ELSEWHERE = "it was copied or moved from elsewhere"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "link": (replace_by_link, "it is a link"),
    "file": (replace_by_file, "it is no folder"),
    "group may read": (lambda folder: folder.chmod(0o750), "its mode is 0750 and must be 0700"),
    "others may write": (lambda folder: folder.chmod(0o702), "its mode is 0702 and must be 0700"),
    "read only": (lambda folder: folder.chmod(0o500), "its mode is 0500 and must be 0700"),
    "no id": (lambda folder: (folder / "id").unlink(), "it was not made by `regctl init`"),
    "copy": (replace_by_copy, ELSEWHERE),
    "empty id": (replace_id(lambda path: path.touch()), BROKEN),
    "words": (replace_id(lambda path: path.write_text("not a number\n")), BROKEN),
    "two fields": (replace_id(lambda path: path.write_text("1 2\n")), BROKEN),
    "huge number": (replace_id(lambda path: path.write_text("9" * 8_000 + " 1 /\n")), BROKEN),
    "huge": (replace_id(lambda path: path.write_bytes(b"\xff" * 10_000_000)), BROKEN),
    "other inode": (replace_id(lambda path: path.write_text(f"1 2 {path.parent}\n")), ELSEWHERE),
    "only the inode": (
        replace_id(lambda path: path.write_text(f"{os.stat(path.parent).st_ino} 0 /elsewhere/.regd\n")),
        ELSEWHERE,
    ),
    "id is a FIFO": (replace_id(os.mkfifo), BROKEN),
    "id is a folder": (replace_id(os.mkdir), BROKEN),
    "id is a link": (replace_id(link_to_a_copy), BROKEN),
}


@pytest.mark.parametrize("case", CASES)
def test_folder_is_ignored_with_one_warning(case: str, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, why = CASES[case]
    outer, inner = made(home), made(home / "shop")
    change(inner)
    os.chdir(home / "shop")
    assert project.search() == project.Search(str(outer), (project.Ignored(str(inner), why),))
    for _ in range(3):
        assert protocol.find_address().project == str(outer)
        regd_client.Client()
    assert ignoring(caplog) == [
        f"{inner} is ignored: {why}; run `regctl init` in {home / 'shop'}, or remove it",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")
def test_folder_of_another_user_is_ignored(home: Path) -> None:
    folder = made(home)
    os.chown(folder, 4711, -1)
    assert project.search().ignored == (
        project.Ignored(str(folder), "it belongs to user 4711, and this program runs as user 0"),
    )
    with pytest.raises(project.ProjectError, match="belongs to user 4711; remove it"):
        project.init(str(home))


def test_folder_that_was_moved_still_counts(home: Path) -> None:
    folder = made(home / "shop")
    (home / "shop").rename(home / "store")
    assert found(home / "store") == str(home / "store" / ".regd")
    assert not folder.exists()


def test_other_number_of_the_device_still_counts(home: Path) -> None:
    folder = made(home)
    (folder / "id").write_text(f"{os.stat(folder).st_ino} 1 {folder}\n")
    assert project.fault(str(folder)) == ""


def test_id_has_inode_device_and_path(home: Path) -> None:
    folder = made(home / "my shop\n")
    status = os.stat(folder)
    assert (folder / "id").read_text() == f"{status.st_ino} {status.st_dev} {folder}\n"
    assert found(home / "my shop\n") == str(folder)


# init.


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_init_makes_a_private_folder_that_git_ignores(home: Path) -> None:
    os.umask(before := os.umask(0o077) & 0)
    try:
        folder = made(home)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / ".gitignore").read_text() == "*\n"
    assert names(folder) == [".gitignore", "id"]


def test_init_again_changes_nothing(home: Path) -> None:
    folder = made(home)
    (folder / "registry.json").write_text("{}")
    before = {path: path.stat() for path in folder.iterdir()}
    assert project.init(str(home)) == (str(folder), None)
    assert {path: path.stat() for path in folder.iterdir()} == before


def test_init_corrects_the_mode_and_keeps_the_registry(home: Path) -> None:
    folder = made(home)
    (folder / "registry.json").write_text("{}")
    folder.chmod(0o755)
    assert project.init(str(home)) == (str(folder), None)
    assert names(folder) == [".gitignore", "id", "registry.json"]
    assert project.fault(str(folder)) == ""


def test_init_on_a_copy_sets_its_files_aside(home: Path) -> None:
    folder = made(home)
    (folder / "registry.json").write_text("{}")
    replace_by_copy(folder)
    _, aside = project.init(str(home))
    assert aside is not None
    assert names(Path(aside)) == ["registry.json"]
    assert names(folder) == [".gitignore", "id", Path(aside).name]
    assert project.fault(str(folder)) == ""
    (folder / "registry.json").write_text("{}")  # the second `init` loses no file either
    (folder / "id").unlink()
    _, second = project.init(str(home))
    assert second not in (None, aside)
    assert (Path(aside) / "registry.json").exists()


def test_init_does_not_trust_a_folder_from_a_repository(home: Path) -> None:
    (home / ".regd").mkdir()
    victim = home / "victim"
    victim.write_text("precious")
    for name in ("id", "id.new", ".gitignore", ".gitignore.new", "try.sock", "registry.json", "regd.log"):
        (home / ".regd" / name).symlink_to(victim)
    _, aside = project.init(str(home))
    assert victim.read_text() == "precious"
    assert names(home / ".regd") == [".gitignore", "id", Path(aside or "").name]
    assert not (home / ".regd" / "id").is_symlink()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_init_refuses_a_link_or_a_file(kind: str, home: Path) -> None:
    if kind == "link":
        (home / "elsewhere").mkdir()
        (home / ".regd").symlink_to("elsewhere")
    else:
        (home / ".regd").touch()
    with pytest.raises(project.ProjectError, match="move it away, then run `regctl init` again"):
        project.init(str(home))
    assert names(home) == sorted([".regd", *(["elsewhere"] if kind == "link" else [])])


def test_init_in_a_missing_or_forbidden_folder_is_an_error(home: Path) -> None:
    with pytest.raises(project.ProjectError, match=r"cannot make .*: No such file or directory; run"):
        project.init(str(home / "missing"))
    (home / "gone").mkdir()
    os.chdir(home / "gone")
    (home / "gone").rmdir()
    with pytest.raises(project.ProjectError, match=r"cannot make .*: No such file or directory; run"):
        project.init(".")
    os.chdir(home)
    (home / "file").touch()
    with pytest.raises(project.ProjectError, match=r"cannot make .*: Not a directory; run"):
        project.init(str(home / "file"))


def refuse(*arguments: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("call", ["bind", "connect"])
def test_init_on_a_file_system_without_sockets_refuses(
    call: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, call, refuse)
    with pytest.raises(
        project.ProjectError, match=r"without Unix sockets \(Operation not supported\); use a checkout"
    ):
        project.init(str(home))
    assert names(home) == []
    (home / ".regd").mkdir()
    (home / ".regd" / "registry.json").write_text("{}")
    with pytest.raises(project.ProjectError, match="without Unix sockets"):
        project.init(str(home))
    assert "registry.json" in names(home / ".regd")  # no file was moved


class Killed(BaseException):
    """Raised in place of a kill of the process."""


@pytest.mark.parametrize("step", range(1, 14))
def test_init_after_a_crash_completes_the_folder(step: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash may come after any system call that changes a file. Only a complete folder is used."""
    (home / ".regd").mkdir(0o700)  # else a failed `init` removes it again
    (home / ".regd" / "registry.json").write_text("old")
    left = step

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **more: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return call(*arguments, **more)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("mkdir", "chmod", "rename", "replace", "write", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            project.init(str(home))
        except Killed:
            assert project.fault(str(home / ".regd")) != ""
    folder, _ = project.init(str(home))
    assert project.fault(folder) == ""
    assert not (Path(folder) / "registry.json").exists()
    [kept] = Path(folder).rglob("registry.json")
    assert kept.read_text() == "old"


def test_failed_init_leaves_no_new_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(project.ProjectError, match="No space left on device"):
            project.init(str(home))
    assert names(home) == []


# Which registry a client uses, and when it searches.


def test_argument_and_variable_take_precedence(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(home)
    at = protocol.find_address()
    assert (str(at), at.project) == (f"unix://{folder}/regd.sock", str(folder))
    assert str(protocol.find_address("127.0.0.1:1")) == "tcp://127.0.0.1:1"
    monkeypatch.setenv("REGD_ADDRESS", "127.0.0.1:2")
    assert str(protocol.find_address()) == "tcp://127.0.0.1:2"
    assert str(protocol.find_address("127.0.0.1:1")) == "tcp://127.0.0.1:1"
    folder.chmod(0o755)  # the folder is not searched for, so there is no warning
    protocol.find_address()
    monkeypatch.setenv("REGD_ADDRESS", "")
    assert not ignoring(caplog)
    assert str(protocol.find_address()) == DEFAULT
    assert len(ignoring(caplog)) == 1


def address_of(client: object) -> str:
    return repr(client).partition(" at ")[2].partition(",")[0]


def test_client_searches_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(home / "a")
    made(home / "b")
    os.chdir(home / "a")
    finder = protocol.AddressFinder(None)
    os.chdir(home / "b")
    assert finder.find().project == str(folder)
    shutil.rmtree(folder)
    assert finder.find().project == str(folder)  # the folder is not searched for again
    monkeypatch.setenv("REGD_ADDRESS", "127.0.0.1:2")  # the variable is read each time
    assert str(finder.find()) == "tcp://127.0.0.1:2"
    monkeypatch.delenv("REGD_ADDRESS")
    assert finder.find().project == str(folder)


async def test_client_stays_with_its_project_after_chdir_break_and_fork(home: Path) -> None:
    made(home / "b")
    folder = made(home / "a")
    os.chdir(home / "a")
    clients = [regd_client.Client(), regd_client.Client()]
    os.chdir(home / "b")
    for _ in range(2):
        async with InLoop(folder / "registry.json", unix=folder / "regd.sock"):
            for client in clients:
                assert await client.register("db", 5432, static=True)
                assert (await client.resolve("db")).port == 5432
    for client in clients:
        assert str(folder) in repr(client)
        client._pid = -1  # as in a forked child
        client._check_fork()
        assert str(client._addresses.find()) == f"unix://{folder}/regd.sock"
        await client.close()


def test_registration_of_a_process_stays_with_its_project(home: Path) -> None:
    """A server may change its folder between the start and the end."""
    folder = made(home / "a")
    os.chdir(home / "a")
    registration = process_registration.ProcessRegistration(RegistrationRequest("shop", 8000), 0.0)
    os.chdir(home)
    assert registration._address_finder.find().project == str(folder)


def test_test_that_uses_a_project_warns_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(home)
    with monkeypatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST")
        client = regd_client.Client()  # as at import, before a test runs
        protocol.find_address()
        assert not caplog.messages
    for _ in range(2):
        client._addresses.find()
        protocol.find_address()
    warning = f"a test uses the project registry {folder}; the fixture `regd` has a private one"
    assert caplog.messages == [warning]
    monkeypatch.setattr(protocol, "_warned", set())
    monkeypatch.setenv("REGD_ADDRESS", "127.0.0.1:2")  # as the fixture `regd` does
    protocol.find_address()
    assert caplog.messages == [warning]


def test_fixture_is_never_confused_by_a_project(
    home: Path, caplog: pytest.LogCaptureFixture, regd: object
) -> None:
    made(home)
    with blocking.register("db", 5432):
        assert blocking.resolve("db").port == 5432
    assert names(home / ".regd") == [".gitignore", "id"]
    assert not caplog.messages


def test_autostart_in_a_project_is_on_unless_the_variable_is_off(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(home)
    at = protocol.find_address()
    for value, wanted in {"": True, "1": True, "0": False, "off": False, "ja": False}.items():
        monkeypatch.setenv("REGD_AUTOSTART", value)
        assert protocol.autostart_wanted(at) is wanted, value
    monkeypatch.delenv("REGD_AUTOSTART")
    assert protocol.autostart_wanted(at)
    assert not protocol.autostart_wanted(protocol.parse_address(str(at)))  # the same socket, given as a path


@pytest.mark.parametrize("length", [107, 108, 300])
async def test_socket_paths_of_any_length(length: int, home: Path) -> None:
    """sockaddr_un holds 107 bytes. For longer paths, clients and daemon use a descriptor of the folder."""
    folder = home
    while (missing := length - len(os.fsencode(folder)) - len("/regd.sock")) > 0:
        folder /= "x" * max(1, min(100, missing - 1))
    folder.mkdir(parents=True)
    path = folder / "regd.sock"
    assert len(os.fsencode(path)) >= length
    before = len(os.listdir("/proc/self/fd"))
    async with InLoop(home / "registry.json", unix=path) as daemon:
        assert f"unix://{path}" in daemon.server.addresses
        async with regd_client.Client(f"unix://{path}") as client:
            await client.register("db", 5432, static=True)

        def ask() -> object:
            with BlockingConnection(f"unix://{path}") as connection:
                return connection.ask("resolve", name="db")["port"]

        assert await asyncio.to_thread(ask) == 5432
    assert not path.exists()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # no descriptor of a folder is left
