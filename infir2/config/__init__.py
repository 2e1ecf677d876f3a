"""Recipes: typed sections, strict loading, provenance of every value. Imports no torch."""

from infir2.config.load import Loaded, load
from infir2.config.resume import changed_keys, check_resume, dump, is_safe
