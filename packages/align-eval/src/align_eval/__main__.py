"""`python -m align_eval` is `align-eval`."""

import sys

from align_eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
