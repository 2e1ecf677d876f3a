"""The reference's name for `infir2 export fp8 INPUT --to OUTPUT --scale-format pow2|fp32`."""

import argparse
import sys

from _infir2 import main

FORMATS = {"True": "pow2", "False": "fp32"}
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--input-bf16-hf-path", required=True)
parser.add_argument("--output-fp8-hf-path", required=True)
parser.add_argument("--force-pow-2-scale", choices=FORMATS, default="True", type=str.capitalize)
options = parser.parse_args()
target = ["--to", options.output_fp8_hf_path, "--scale-format", FORMATS[options.force_pow_2_scale]]
sys.exit(main(["export", "fp8", options.input_bf16_hf_path, *target]))
