"""infir2's `main` for the tools beside this file, or one sentence for a Python without infir2."""

import sys

try:
    from infir2.cli import main as main
except ImportError as error:
    sys.stderr.write(
        f"infir2: error: {sys.executable} cannot import infir2 ({error}); run the tool with the "
        "Python that has it: .venv/bin/python after `make venv`.\n"
    )
    sys.exit(2)
