"""The shop under faults: customers who want every order dealt with, and a storm of what ends or stops processes."""
