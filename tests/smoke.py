"""Try the installed package, not the checkout: `python3 tests/smoke.py FOLDER`, with the folder of its commands."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    commands = Path(sys.argv[1]).resolve()
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("REGD_", "PYTHON"))}
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str, **environment: str) -> str:
            done = subprocess.run(
                [str(commands / command[0]), *command[1:]],
                cwd=folder, env=plain | environment, capture_output=True, text=True, check=True, timeout=30,
            )  # fmt: skip
            return done.stdout

        assert run("regd", "--version").startswith("regd ")
        assert run("regctl", "--version").startswith("regctl ")
        for shell in ("bash", "zsh", "fish"):
            assert "regctl" in run("regctl", "completion", shell)
        for page in ("regctl", "regd"):
            text = run("regctl", "manual", page)
            assert text.startswith(".TH ")
            assert (commands.parent / "share" / "man" / "man1" / f"{page}.1").read_text() == text
        pages = commands.parent / "share" / "doc" / "regd"
        assert run("regctl", "help").endswith(f"\nDocuments: {pages.resolve()}\n")
        for document in pages.rglob("*.md"):
            for link in re.findall(r"\]\((?!https?:)([^)#:]+)", document.read_text()):
                assert (document.parent / link).exists(), f"{document}: {link}"
        assert {"README.md", "client/SERVERS.md", "regd/TROUBLESHOOTING.md", "regd/cli/README.md"} <= {
            page.relative_to(pages).as_posix() for page in pages.rglob("*.md")
        }
        code = "import importlib.metadata as m; print(m.metadata('regd')['Description'])"
        description = run("python", "-c", code)
        assert description.startswith("# regd\n")
        assert re.findall(r"\]\((?!https?:)[^)]*\)", description) == []
        code = "import regd_client, pathlib; print(pathlib.Path(regd_client.__file__).with_name('py.typed').exists(), regd_client.Client.__name__)"
        assert run("python", "-c", code) == "True Client\n"
        code = "import regd, pathlib; print(sorted(each.name for each in pathlib.Path(*regd.__path__, 'systemd').rglob('regd*')))"
        units = ["regd-bridge.service", "regd-serve.service", "regd.service", "regd.socket"]
        assert run("python", "-c", code) == f"{sorted(2 * units)}\n"
        for extra, words in (("serve", ["serve"]), ("etcd", ["bridge", "--etcd", "127.0.0.1:2379"])):
            done = subprocess.run(
                [commands / "regctl", *words], cwd=folder, env=plain, capture_output=True, text=True, check=False, timeout=30,
            )  # fmt: skip
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
            assert f"pip install 'regd[{extra}]'" in done.stderr
        code = "import regd, pathlib; print(sorted(each.name for each in pathlib.Path(*regd.__path__, 'gateways', 'page').iterdir()))"
        assert run("python", "-c", code) == "['index.html', 'page.css', 'page.js']\n"
        daemon = subprocess.Popen(
            [commands / "regd", "--port", "0", "--registry", "registry.json", "--log-level", "warning"],
            cwd=folder, env=plain, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert daemon.stdout is not None
            address = daemon.stdout.readline().split()[1]
            run("regctl", "register", "db", "5432", REGD_ADDRESS=address)
            assert run("regctl", "resolve", "db", REGD_ADDRESS=address) == "127.0.0.1:5432\n"
            code = "import asyncio, regd_client; print(asyncio.run(regd_client.resolve('db')))"
            assert run("python", "-c", code, REGD_ADDRESS=address) == "127.0.0.1:5432\n"
        finally:
            daemon.terminate()
            assert daemon.wait(10) == 0
    sys.stdout.write("smoke test of the wheel: passed\n")


if __name__ == "__main__":
    main()
