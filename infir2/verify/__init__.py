"""Check answers and programs. The one security boundary: nothing here imports torch, and no program runs outside a jail."""

from infir2.verify.code import run_code
from infir2.verify.math import check_math, check_math_batch
from infir2.verify.sandbox import JailError, Limits
from infir2.verify.verdict import Verdict
