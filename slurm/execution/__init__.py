"""How steps run: jobs, ranks, the launcher, this machine's scheduler, SLURM's queue."""
