"""`python -m tidemill`: the same as the command `tidemill`."""

import sys

from tidemill.cli import main

sys.exit(main())
