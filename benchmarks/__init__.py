"""What coord promises in figures, measured: each benchmark starts servers of its own and says what it ran beside."""
