"""Studies: every arm (a change to one base configuration) with every seed, run on this machine or by Slurm."""
