"""The reference's name for `infir2 export fp8 INPUT --to OUTPUT --scale-format pow2|fp32`."""

import argparse
import sys

from infir2.cli import main

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--input-bf16-hf-path", required=True)
parser.add_argument("--output-fp8-hf-path", required=True)
parser.add_argument(
    "--force-pow-2-scale", choices=("True", "False"), default="True", type=str.capitalize
)
options = parser.parse_args()
source, target = options.input_bf16_hf_path, options.output_fp8_hf_path
scale_format = "pow2" if options.force_pow_2_scale == "True" else "fp32"
sys.exit(main(["export", "fp8", source, "--to", target, "--scale-format", scale_format]))
