"""`infir2 ARGUMENTS` on every rank with faults injected into one of them; records exit codes.

torchrun --nproc_per_node 2 one_rank.py CODES_DIR 1 train.step:3:term cpt RECIPE.toml ...
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    directory, faulty_rank, faults, *arguments = sys.argv[1:]
    rank = os.environ["RANK"]
    if rank == faulty_rank:
        os.environ["INFIR2_FAULTS"] = faults
    from infir2.cli import main

    # torchrun sends SIGTERM when another rank ends first; the exit code must be written regardless.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = main(arguments)
    Path(directory, f"rank-{rank}").write_text(str(code))
    os._exit(code)
