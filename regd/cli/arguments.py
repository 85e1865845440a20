"""Command-line arguments on top of argparse. Parser, help, manual and completion all use one declaration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from regd.cli.output import Output, complain, visible

_WIDTH = 80  # of help, if stdout is not a terminal


class UsageError(Exception):
    """An invalid command line. `prog` is the name of the program, followed by its command if that is known."""

    def __init__(self, prog: str, message: str) -> None:
        super().__init__(message)
        self.prog = prog


class HelpFormatter(argparse.HelpFormatter):
    """Wraps each paragraph, except paragraphs that contain line breaks."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width() - 2)  # without `width`, argparse would import shutil, which is slow

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
    """An argparse parser that raises `UsageError` for an invalid command line and ignores a broken stdout."""

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

    `options` are those of `ArgumentParser.add_argument`. `completion` says which values shell completion offers
    besides `choices`: "service" for names of services, "command" for commands, "" for none.
    """

    def __init__(self, name: str, doc: str, *, completion: str = "", **options: Any) -> None:
        self.name = name
        self.doc = doc
        self.completion = completion
        self.options = options

    @property
    def is_option(self) -> bool:
        return self.name.startswith("-")


# Parse values, for `type=`.


def seconds(minimum: float, maximum: float) -> Callable[[str], float]:
    """Return a function that parses a number of seconds from `minimum` to `maximum`."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not minimum <= number <= maximum:
            raise argparse.ArgumentTypeError(f"must be {minimum:g} to {maximum:g} seconds, not {text!r}")
        return number

    return parse


def port_or_off(text: str) -> int | str:
    if text == "off":
        return text
    port = integer(text, 0, 65_535)
    if port is None:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, or off, not {text!r}")
    return port


def integer(text: str, minimum: int, maximum: int) -> int | None:
    """Parse a decimal integer from `minimum` to `maximum`. Return None if the text is anything else."""
    if not text.isascii() or not text.isdigit() or len(text) > len(str(maximum)):
        return None
    number = int(text)
    return number if minimum <= number <= maximum else None
