"""`infir2 check`."""

from infir2.preflight.checks import check

__all__ = ["check"]
