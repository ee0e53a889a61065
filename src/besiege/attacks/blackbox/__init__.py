"""Evasion with scores or labels alone."""
