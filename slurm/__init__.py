"""The suite as a graph of jobs, on one machine or on SLURM."""
