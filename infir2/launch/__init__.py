"""Start a command on many processes and nodes; torchrun, SLURM and Ray manage the processes."""
