"""``python -m diffalign``, the same as ``diffalign``."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
