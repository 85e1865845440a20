"""The programs of the page on testing are suites that pass, and its report is what a failed test shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from regd.testing import running
from tests.support.daemon import ROOT
from tests.support.documents import blocks
from tests.testing.suites import Suite, clean

PAGE = ROOT / "regd" / "testing" / "README.md"


@pytest.mark.parametrize(
    "flags", [[], pytest.param(["-n", "2"], marks=pytest.mark.long)], ids=["alone", "workers"]
)
def test_programs_of_the_page(tmp_path: Path, flags: list[str]) -> None:
    programs = blocks(PAGE, "python")
    suite = Suite(tmp_path, programs[0])
    for number, program in enumerate(programs[1:]):
        suite.write(f"test_{number}.py", program)
    assert f"{len(programs) + 1} passed" in suite.passes(*flags)


def test_unittest_suite_runs_without_pytest(tmp_path: Path) -> None:
    [program] = [block for block in blocks(PAGE, "python") if "unittest.main()" in block]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=clean(), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Warning" not in done.stderr


def test_options_of_the_page(tmp_path: Path) -> None:
    [options] = blocks(PAGE, "toml")
    suite = Suite(
        tmp_path, "def test_it(regd, pytestconfig):\n    assert pytestconfig.inipath.name == 'pyproject.toml'\n"
    )
    (suite.folder / "pytest.ini").unlink()
    suite.write("pyproject.toml", options)
    suite.passes("--strict-config", "-p", "no:cacheprovider")


def test_report_of_the_page() -> None:
    """The registry describes itself as on the page, except for numbers."""
    [report] = blocks(PAGE, "text")
    with running() as registry:
        registry.register("db", 5432)
        described = registry.described()
    assert re.sub("[0-9]+", "0", described) == re.sub("[0-9]+", "0", report.partition("\n")[2]).rstrip("\n")
