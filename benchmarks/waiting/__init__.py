"""`python -m benchmarks.waiting`: what a wait costs, how soon it is woken, and what that costs the writers."""
