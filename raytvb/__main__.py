"""`python -m raytvb`."""

import sys

from raytvb.cli import main

if __name__ == "__main__":
    sys.exit(main())
