"""`python -m mmsearch` is the command `mmsearch`."""

import sys

from mmsearch.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
