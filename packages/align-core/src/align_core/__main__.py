"""`python -m align_core` is the `align` command."""

import sys

from align_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
