"""What the build adds to the packages: the pages, the man pages, and a README without relative links."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = "share/doc/regd"  # below the prefix of the installation
MAN = "share/man/man1"
RELATIVE_LINK = re.compile(r"!?\[([^\]]+)\]\(([^)#:]+)(?:#[^)]*)?\)")


def linked_from(page: Path) -> Iterator[Path]:
    """Yield a page, and all files that its relative links lead to, directly or by way of other pages."""
    rest, seen = [page.resolve()], set()
    while rest:
        path = rest.pop()
        if path in seen:
            continue
        seen.add(path)
        if path.is_dir():
            rest.extend(path.iterdir())
            continue
        yield path
        if path.suffix == ".md":
            text = path.read_text("utf-8")
            rest.extend((path.parent / link).resolve(strict=True) for _, link in RELATIVE_LINK.findall(text))


class CustomMetadataHook(MetadataHookInterface):
    """The description: the README, with paths in place of relative links, since a package index has no pages."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": RELATIVE_LINK.sub(r"\1 (`\2`)", text)}


class CustomBuildHook(BuildHookInterface):
    """Adds to the wheel the README and the pages that it leads to, in their folders, and the man pages."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return  # the checkout has the pages
        root = Path(self.root).resolve()
        for path in linked_from(root / "README.md"):
            build_data["shared_data"][str(path)] = f"{PAGES}/{path.relative_to(root).as_posix()}"
        self._folder = tempfile.TemporaryDirectory()
        packages = os.pathsep.join([str(root), str(root / "client")])
        for name in ("regctl", "regd"):
            page = Path(self._folder.name, f"{name}.1")
            with page.open("wb") as file:
                subprocess.run(
                    [sys.executable, "-m", "regd.cli.regctl", "manual", name],
                    env=os.environ | {"PYTHONPATH": packages},
                    stdout=file,
                    check=True,
                )
            build_data["shared_data"][str(page)] = f"{MAN}/{page.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._folder.cleanup()
