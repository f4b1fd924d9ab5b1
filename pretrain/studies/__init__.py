"""Studies: every arm (a change to one base configuration) with every seed, matched, run here or by Slurm."""
