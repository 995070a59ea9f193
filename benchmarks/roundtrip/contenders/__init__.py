"""One module for each package that is compared, which imports it and what is the same for all, and nothing else."""
