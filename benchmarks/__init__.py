"""besiege against the floor and its peers; `python -m benchmarks` writes docs/benchmarks.md."""

from pathlib import Path

RECORDS = Path(__file__).with_name("records")
"""What the long benchmarks measured, a file a cell: pages are made of it, and a run goes on where the last stopped."""
