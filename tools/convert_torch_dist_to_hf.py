"""The reference's name for `infir2 import megatron INPUT_DIR --to OUTPUT_DIR --like HF_DIR`."""

import argparse
import sys

from _infir2 import main

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--input-dir", required=True)
parser.add_argument("--output-dir", required=True)
parser.add_argument("--origin-hf-dir")
options = parser.parse_args()
like = ["--like", options.origin_hf_dir] if options.origin_hf_dir else []
sys.exit(main(["import", "megatron", options.input_dir, "--to", options.output_dir, *like]))
