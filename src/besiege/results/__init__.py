"""The facts of a siege, plain and verified. Imports no torch."""
