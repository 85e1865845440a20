"""The pages: replay their conversations, run their programs and commands, compare their tables."""

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
from tests.support.peers import FakeCredentials
from tests.testing.suites import Suite

PROTOCOL, DESIGN, README, CLIENT, REGCTL = (
    ROOT / name
    for name in ("regd/PROTOCOL.md", "regd/DESIGN.md", "README.md", "client/README.md", "regd/cli/README.md")
)
CONVERSATIONS = blocks(PROTOCOL, "transcript")


@pytest.mark.socket
@pytest.mark.parametrize("text", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
async def test_protocol_conversations(text: str, daemon: InLoop) -> None:
    await replay(text, daemon)


@pytest.mark.socket
async def test_protocol_conversation_of_another_user(tmp_path: Path) -> None:
    [text] = blocks(PROTOCOL, "transcript of another user")
    async with InLoop(tmp_path / "registry.json", peers=FakeCredentials()) as daemon:
        await replay(text, daemon)


def test_protocol_page_has_every_command_and_error() -> None:
    page = PROTOCOL.read_text()
    sent = "".join(CONVERSATIONS)
    for name, command in COMMANDS.items():
        arguments = " ".join(
            f"`{key}`" if argument.required else f"[`{key}`]" for key, argument in command.arguments.items()
        )
        assert f"| `{name}` | {arguments} | {command.doc} | {command.result} |" in page, name
        assert f'"cmd":"{name}"' in sent, f"no conversation shows {name}"
    for code in Code:
        assert f"| `{code}` | {code.meaning} |" in page, code


def test_protocol_page_has_the_http_refusal() -> None:
    assert f"```text\n{HTTP_REFUSAL.decode()}```".replace("\r\n", "\n") in PROTOCOL.read_text()


def limit_rows() -> list[str]:
    rows = []
    for limit in fields(Limits):
        texts = limit.metadata
        error = f"`{texts['error']}`" if texts["error"] else ""
        size = limit.default * texts["each_bytes"] / 2**20
        memory = f"{size:.0f} MiB" if size else ""
        rows.append(
            f"| `{limit.name}` | {limit.default:,} | {texts['why']} | {texts['beyond']} | {error} | {memory} |"
        )
    return rows


def test_design_page_has_every_limit() -> None:
    page = DESIGN.read_text()
    for row in limit_rows():
        assert row in page, row
    assert f"together {Limits().memory_bytes / 2**20:.0f} MiB" in page


async def test_first_lines_of_the_readme(regd_in_process: InProcessRegistry) -> None:
    [lines] = blocks(README, "python await")
    namespace: dict[str, object] = {"regd_client": regd_client}
    code = compile(lines, str(README), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await FunctionType(code, namespace)()
    shop = namespace["shop"]
    assert isinstance(shop, regd_client.Endpoint)
    assert (shop.host, shop.port) == ("127.0.0.1", 8000)


def test_readme_service_passes_the_readme_test(tmp_path: Path) -> None:
    service, test = (text for text in blocks(README, "python") if text.startswith("# "))
    suite = Suite(tmp_path, test)
    suite.write(service.partition("\n")[0].removeprefix("# "), service)
    assert "1 passed" in suite.passes()


def test_programs_of_readme_and_client_page_run(process: DaemonProcess, tmp_path: Path) -> None:
    for number, program in enumerate(blocks(CLIENT, "python") + blocks(README, "python")):
        path = tmp_path / f"program{number}.py"
        path.write_text(program)
        done = subprocess.run(
            [sys.executable, "-W", "error", str(path)], env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), program


@pytest.mark.parametrize("page", [README, REGCTL], ids=["README", "regctl"])
def test_console_sessions(page: Path, process: DaemonProcess) -> None:
    """Each command prints the lines that the page shows, except for times; … stands for any text."""
    text = "".join(blocks(page, "console"))
    if "| nc " in text and shutil.which("nc") is None:
        pytest.skip("no nc on this machine")
    commands = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    assert len(commands) >= 3
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for entry in commands:
        command, _, expected = entry.partition("\n")
        command = command.replace(" 7343", f" {process.port}").replace(" registry.json", f" {process.registry}")
        done = subprocess.run(
            ["bash", "-c", command], env=environment(REGD_ADDRESS=process.addresses[0], PATH=path), capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        printed = re.sub(r"\d{10}\.\d+", "TIME", done.stdout).splitlines()
        lines = re.sub(r"\d{10}\.\d+", "TIME", expected).splitlines()
        assert len(printed) == len(lines), f"{command}: {printed}"
        assert all(map(fits, lines, printed)), f"{command}: {printed}"


def test_regctl_understands_every_command_line() -> None:
    """Check the lines that are not run because they start programs of the reader."""
    count = 0
    for page in (README, REGCTL, ROOT / "services" / "TUTORIAL.md"):
        for text in blocks(page, "sh[^\n]*"):
            for line in re.findall(r"\bregctl [^#&|)\n]*", text):
                commands.read(shlex.split(line)[1:])
                count += 1
    assert count >= 8


def test_readme_names_make_run_and_make_test() -> None:
    text = README.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for command in ("run", "test"):
        assert f"make {command}" in text
        assert f"\n{command}:" in makefile


def test_design_page_names_every_module() -> None:
    folder = ROOT / "regd"
    modules = {
        path.relative_to(folder).as_posix() for path in folder.glob("*/**/*.py") if path.name != "__init__.py"
    }
    named = set(re.findall(r"`([a-z]+/[a-z0-9_/]+\.py)`", DESIGN.read_text()))
    assert {
        path for path in named if "/test_" not in path and not path.startswith(("client/", "tests/"))
    } == modules


def test_test_files_named_by_pages_exist() -> None:
    for page in (DESIGN, ROOT / "tests" / "README.md"):
        for path in re.findall(r"`((?:tests/)?[a-z_]+/[a-z0-9_/]*test_[a-z0-9_]+\.py)`", page.read_text()):
            assert (ROOT / "tests" / path.removeprefix("tests/")).exists(), f"{page.name}: {path}"


def test_links_lead_to_files() -> None:
    pages = [path for path in ROOT.rglob("*.md") if not {".venv", ".venv-wheel"} & set(path.parts)]
    assert len(pages) > 5
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_example_file_loads(tmp_path: Path) -> None:
    (example,) = blocks(PROTOCOL, "json")
    path = tmp_path / "registry.json"
    path.write_text(example)

    async def serve() -> None:
        async with InLoop(path) as daemon:
            assert (await (await daemon.peer()).ask("resolve runner"))["port"] == json.loads(example)["runner"][
                "port"
            ]

    asyncio.run(serve())
