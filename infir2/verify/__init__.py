"""Check answers and programs. The one security boundary: nothing here imports torch, and no program runs outside a jail."""

from infir2.verify.math import check_math, check_math_batch
from infir2.verify.verdict import Verdict

__all__ = ["Verdict", "check_math", "check_math_batch"]
