"""`python -m benchmarks.roundtrip`: the same request, from row to job to answer, by coord, by hand and by its peers."""
