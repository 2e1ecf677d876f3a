"""`infir2 plan`: memory, time and layout of a run on GPUs that this machine need not have."""
