"""besiege against the floor and its peers; `python -m benchmarks` writes docs/benchmarks.md."""
