"""The guard: scores, rewrites, and what the user may see."""
