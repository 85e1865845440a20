"""`python -m regd` is the daemon, as the command `regd` is."""

import sys

from regd.cli.regd import main

if __name__ == "__main__":
    sys.exit(main())
