"""Run the command line as ``python -m lamplighter_agent``."""

import sys

from lamplighter_agent.cli import main

sys.exit(main())
