import sys

from infir2.cli import main
from infir2.launch.ranks import run_rank

sys.exit(run_rank(main))
