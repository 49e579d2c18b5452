"""`python -m raytvb`."""

from __future__ import annotations

import sys

from raytvb.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
