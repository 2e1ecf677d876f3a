"""Run by torchrun: `infir2 WORDS` on every rank, with faults injected into one of them; leaves each rank's exit code.

torchrun --nproc_per_node 2 one_rank.py CODES_DIR 1 train.step:3:term cpt RECIPE.toml ...
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    directory, struck, faults, *words = sys.argv[1:]
    rank = os.environ["RANK"]
    if rank == struck:
        os.environ["INFIR2_FAULTS"] = faults
    from infir2.cli import main

    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # torchrun's, when the other rank was faster: main's code is to be written
    code = main(words)
    Path(directory, f"rank-{rank}").write_text(str(code))
    os._exit(code)
