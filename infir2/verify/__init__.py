"""Check answers and programs. This package is the security boundary: programs run only in jails.

Nothing in it imports torch.
"""

from infir2.verify.code import run_code
from infir2.verify.math import check_math, check_math_batch
from infir2.verify.sandbox import JailError, Limits
from infir2.verify.verdict import Verdict
