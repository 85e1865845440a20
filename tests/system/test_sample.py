"""The test suite of another project (`tests/sample`), with the built wheel in an environment of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import ROOT

SAMPLE = ROOT / "tests" / "sample"
TEST_PACKAGES = ("pytest", "pytest-asyncio", "pytest-xdist")
_OFFLINE = ("No matching distribution found", "Connection", "Temporary failure in name resolution")


def install(*command: str | Path) -> None:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("REGD_", "PYTHON", "PYTEST_"))
    }
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    output = done.stdout + done.stderr
    if done.returncode and any(words in output for words in _OFFLINE):
        pytest.skip(f"the package index cannot be reached: {output.splitlines()[-1]}")
    assert done.returncode == 0, output


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and pytest."""
    folder = tmp_path_factory.mktemp("wheel")
    install(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", ROOT)
    install(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv/bin/python"
    [wheel] = (folder / "dist").glob("*.whl")
    install(python, "-m", "pip", "install", "-q", wheel, *TEST_PACKAGES)
    return python


@pytest.mark.long
@pytest.mark.timeout(600)  # builds the wheel and downloads packages
@pytest.mark.parametrize(
    "flags", [[], ["-n", "2"], ["-n", "2", "-o", "regd_storage=tmp_path"]], ids=["alone", "workers", "files"]
)
def test_sample_project_with_the_wheel(python: Path, tmp_path: Path, flags: list[str]) -> None:
    project = tmp_path / "shop"
    shutil.copytree(SAMPLE, project, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", *flags], cwd=project, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 passed" in done.stdout
