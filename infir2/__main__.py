"""`python -m infir2` is the `infir2` command."""

import sys

from infir2.cli import main

sys.exit(main())
