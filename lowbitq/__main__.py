"""python -m lowbitq: the command line."""

import sys

from lowbitq.cli import main

sys.exit(main())
