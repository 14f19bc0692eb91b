"""`python -m quantwire`, where the script `quantwire` is not in PATH."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
