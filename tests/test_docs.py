"""The pages are true: tests replay their conversations, run their programs and commands, and compare their tables."""

import ast
import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import FunctionType

import pytest

import regd_client
from regd.cli import commands
from regd.core.errors import Code
from regd.core.limits import Limits
from regd.protocol.commands import COMMANDS
from regd.protocol.messages import HTTP_REFUSAL
from regd.testing.in_process import InProcessRegistry
from tests.support.daemon import ROOT, DaemonProcess, InLoop, environment
from tests.support.documents import blocks, fits, replay
from tests.support.peers import Told
from tests.testing.suites import Suite

PROTOCOL, DESIGN, README, CLIENT, REGCTL = (
    ROOT / name
    for name in ("regd/PROTOCOL.md", "regd/DESIGN.md", "README.md", "client/README.md", "regd/cli/README.md")
)
CONVERSATIONS = blocks(PROTOCOL, "transcript")


@pytest.mark.socket
@pytest.mark.parametrize("text", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
async def test_the_conversations_of_the_protocol_page(text: str, daemon: InLoop) -> None:
    await replay(text, daemon)


@pytest.mark.socket
async def test_what_the_protocol_page_says_of_other_users(tmp_path: Path) -> None:
    [text] = blocks(PROTOCOL, "transcript of another user")
    async with InLoop(tmp_path / "registry.json", peers=Told()) as daemon:
        await replay(text, daemon)


def test_every_command_and_error_is_in_the_protocol_page() -> None:
    page = PROTOCOL.read_text()
    sent = "".join(CONVERSATIONS)
    for name, command in COMMANDS.items():
        arguments = " ".join(
            f"`{key}`" if argument.required else f"[`{key}`]" for key, argument in command.arguments.items()
        )
        assert f"| `{name}` | {arguments} |" in page, name
        assert f'"cmd":"{name}"' in sent, f"no conversation shows {name}"
    for code in Code:
        assert f"| `{code}` | {code.meaning} |" in page, code


def test_the_refusal_in_http_is_in_the_protocol_page() -> None:
    assert f"```text\n{HTTP_REFUSAL.decode()}```".replace("\r\n", "\n") in PROTOCOL.read_text()


def limit_rows() -> list[str]:
    rows = []
    for row in fields(Limits):
        told = row.metadata
        error = f"`{told['error']}`" if told["error"] else ""
        size = row.default * told["each_bytes"] / 2**20
        memory = f"{size:.0f} MiB" if size else ""
        rows.append(f"| `{row.name}` | {row.default:,} | {told['why']} | {told['beyond']} | {error} | {memory} |")
    return rows


def test_the_limits_are_in_the_design_page() -> None:
    page = DESIGN.read_text()
    for row in limit_rows():
        assert row in page, row
    assert f"together {Limits().memory_bytes / 2**20:.0f} MiB" in page


async def test_the_first_lines_of_the_readme(regd_in_process: InProcessRegistry) -> None:
    [lines] = blocks(README, "python await")
    namespace: dict[str, object] = {"regd_client": regd_client}
    code = compile(lines, str(README), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await FunctionType(code, namespace)()
    shop = namespace["shop"]
    assert isinstance(shop, regd_client.Endpoint)
    assert (shop.host, shop.port) == ("127.0.0.1", 8000)


def test_the_service_and_the_test_of_the_readme(tmp_path: Path) -> None:
    service, test = (text for text in blocks(README, "python") if text.startswith("# "))
    suite = Suite(tmp_path, test)
    suite.write(service.partition("\n")[0].removeprefix("# "), service)
    assert "1 passed" in suite.passes()


def test_the_program_of_the_client_page_runs(process: DaemonProcess, tmp_path: Path) -> None:
    for number, program in enumerate(blocks(CLIENT, "python") + blocks(README, "python")):
        path = tmp_path / f"program{number}.py"
        path.write_text(program)
        done = subprocess.run(
            [sys.executable, "-W", "error", str(path)], env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), program


@pytest.mark.parametrize("page", [README, REGCTL], ids=["README", "regctl"])
def test_the_sessions_of_a_page(page: Path, process: DaemonProcess) -> None:
    """Their commands, typed into a shell, print what stands there, but for the times; … stands for anything."""
    text = "".join(blocks(page, "console"))
    if "| nc " in text and shutil.which("nc") is None:
        pytest.skip("no nc on this machine")
    commands = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    assert len(commands) >= 3
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for each in commands:
        command, _, expected = each.partition("\n")
        command = command.replace(" 7343", f" {process.port}").replace(" registry.json", f" {process.registry}")
        done = subprocess.run(
            ["bash", "-c", command], env=environment(REGD_ADDRESS=process.addresses[0], PATH=path), capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        shown = re.sub(r"\d{10}\.\d+", "TIME", done.stdout).splitlines()
        wanted = re.sub(r"\d{10}\.\d+", "TIME", expected).splitlines()
        assert len(shown) == len(wanted), f"{command}: {shown}"
        assert all(map(fits, wanted, shown)), f"{command}: {shown}"


def test_every_command_line_of_the_pages_is_understood() -> None:
    """What the sessions do not run: lines with programs of the reader's own."""
    seen = 0
    for page in (README, REGCTL, ROOT / "services" / "TUTORIAL.md"):
        for text in blocks(page, "sh[^\n]*"):
            for line in re.findall(r"\bregctl [^#&|)\n]*", text):
                commands.read(shlex.split(line)[1:], str)
                seen += 1
    assert seen >= 8


def test_the_readme_has_the_two_commands() -> None:
    text = README.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for command in ("run", "test"):
        assert f"make {command}" in text
        assert f"\n{command}:" in makefile


def test_the_design_page_names_every_module() -> None:
    folder = ROOT / "regd"
    modules = {
        path.relative_to(folder).as_posix() for path in folder.glob("*/**/*.py") if path.name != "__init__.py"
    }
    named = set(re.findall(r"`([a-z]+/[a-z0-9_/]+\.py)`", DESIGN.read_text()))
    assert {
        path for path in named if "/test_" not in path and not path.startswith(("client/", "tests/"))
    } == modules


def test_the_pages_of_the_tests_name_files_that_exist() -> None:
    for page in (DESIGN, ROOT / "tests" / "README.md"):
        for path in re.findall(r"`((?:tests/)?[a-z_]+/[a-z0-9_/]*test_[a-z0-9_]+\.py)`", page.read_text()):
            assert (ROOT / "tests" / path.removeprefix("tests/")).exists(), f"{page.name}: {path}"


def test_links_lead_somewhere() -> None:
    pages = [path for path in ROOT.rglob("*.md") if not {".venv", ".venv-wheel"} & set(path.parts)]
    assert len(pages) > 5
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_example_of_the_file_loads(tmp_path: Path) -> None:
    (example,) = blocks(PROTOCOL, "json")
    path = tmp_path / "registry.json"
    path.write_text(example)

    async def serve() -> None:
        async with InLoop(path) as daemon:
            assert (await (await daemon.peer()).ask("resolve runner"))["port"] == json.loads(example)["runner"][
                "port"
            ]

    asyncio.run(serve())
