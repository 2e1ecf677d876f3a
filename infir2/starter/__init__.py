"""Before the first run: `infir2 data inspect` looks at data, `infir2 init` writes a recipe."""
