"""Studies: arms (differences of one configuration) times seeds, run one after another or by Slurm, and matched."""
