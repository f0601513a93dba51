"""Starting the ranks of a run: on this host, on many, under Slurm."""
