"""`python -m benchmarks.scaling`: coord with more processes, what a request costs, and where that leads."""
