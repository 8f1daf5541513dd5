"""python -m fedlth."""

import sys

from fedlth.cli import main

sys.exit(main())
