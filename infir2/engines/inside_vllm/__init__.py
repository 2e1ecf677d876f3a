"""Code that runs in vLLM's process and environment: it imports nothing of infir2."""
