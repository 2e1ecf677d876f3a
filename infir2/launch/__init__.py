"""Starting a command on many processes and nodes: torchrun, SLURM, Ray. They manage processes; nothing of that is done here."""
