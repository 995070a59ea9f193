"""`python -m benchmarks.backlog`: a worker that has a million jobs for later, and a hundred thousand at once."""
