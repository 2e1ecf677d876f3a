"""Chat templates, rendered as transformers renders them. Imports no torch."""
