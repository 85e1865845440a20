"""Command lines on argparse: one declaration of an argument serves parser, help, manual and completion."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from regd.cli.output import Output, complain, visible

_WIDTH = 80  # where stdout is no terminal


class UsageError(Exception):
    """A command line that cannot be understood. `prog` is the program, with its command if that is known."""

    def __init__(self, prog: str, message: str) -> None:
        super().__init__(message)
        self.prog = prog


class HelpFormatter(argparse.HelpFormatter):
    """Fills each paragraph, and leaves one that has line breaks as it is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width() - 2)  # argparse would import shutil for the width

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            paragraph if "\n" in paragraph else super(HelpFormatter, self)._fill_text(paragraph, width, indent)
            for paragraph in text.split("\n\n")
        )


def _width() -> int:
    try:
        return os.get_terminal_size().columns or _WIDTH
    except OSError:
        return _WIDTH


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `UsageError` for a bad command line and never fails on a broken stdout."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def add_parameters(self, parameters: Iterable[Parameter]) -> None:
        for parameter in parameters:
            self.add_argument(parameter.name, help=parameter.doc, **parameter.options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(self.prog, f"{visible(message)} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stderr:
            complain(message.rstrip("\n"))
        else:
            Output.write(message)


class Parameter:
    """One argument of a command line.

    `options` are those of `ArgumentParser.add_argument`. `completion` is what a shell offers in its place besides
    `choices`: "service", "command", or "" for nothing.
    """

    def __init__(self, name: str, doc: str, *, completion: str = "", **options: Any) -> None:
        self.name = name
        self.doc = doc
        self.completion = completion
        self.options = options

    @property
    def is_option(self) -> bool:
        return self.name.startswith("-")


# Types of values, for `type=`.


def seconds(least: float, most: float) -> Callable[[str], float]:
    """Return a type for a number of seconds from `least` to `most`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be {least:g} to {most:g} seconds, not {text!r}")
        return number

    return read


def integer(text: str, least: int, most: int) -> int | None:
    """Return a decimal number from `least` to `most`, or None if the text is none."""
    if not text.isascii() or not text.isdigit() or len(text) > len(str(most)):
        return None
    number = int(text)
    return number if least <= number <= most else None
