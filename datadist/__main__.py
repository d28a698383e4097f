"""`python -m datadist` is the command `datadist`."""

import sys

from datadist.cli import main

if __name__ == "__main__":
    sys.exit(main())
