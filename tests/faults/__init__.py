"""The fault matrix: every part of a running shop under every fault, and what a user observes of it."""
