"""Recipes: typed sections, strict loading with provenance, the resolved recipe of a run. Imports no torch."""

from infir2.config.load import Loaded, load
from infir2.config.resume import changed_keys, check_resume, dump, is_safe
