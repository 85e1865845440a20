"""The entry point of `regctl`, the command that queries and changes the registry from a terminal or a script."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 1: not found or not in time. 2: bad usage. 3: no daemon. 4: refused otherwise, or stdout cannot be
    written.
    """
    gc.disable()
    from regd.cli import handlers
    from regd.cli.commands import REFUSED
    from regd.cli.output import Output, finish, open_standard_streams

    gc.freeze()  # modules live until exit; scanning them for garbage would take a quarter of the run time
    gc.enable()
    if argv is None and os.getpid() == 1:
        from regd.cli import child

        status = child.run_as_init()
        if status is not None:
            return status
    open_standard_streams()
    Output.failure = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # instead of a UnicodeEncodeError
    try:
        status = handlers.run(sys.argv[1:] if argv is None else argv)
        return status if finish("regctl") else REFUSED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
