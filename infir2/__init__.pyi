# What type checkers read: __init__.py imports the two names at their first use.
from infir2.numerics import Fp8Linear as Fp8Linear
from infir2.numerics import convert_to_fp8 as convert_to_fp8

__version__: str
