"""The siege as a plan of cells, and what runs it."""
