"""The reference's word for `infir2 import megatron INPUT_DIR --to OUTPUT_DIR --like ORIGIN_HF_DIR`."""

import argparse
import sys

from infir2.cli import main

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--input-dir", required=True)
parser.add_argument("--output-dir", required=True)
parser.add_argument("--origin-hf-dir")
words = parser.parse_args()
like = ["--like", words.origin_hf_dir] if words.origin_hf_dir else []
sys.exit(main(["import", "megatron", words.input_dir, "--to", words.output_dir, *like]))
