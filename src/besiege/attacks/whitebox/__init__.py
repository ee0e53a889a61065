"""Evasion with gradients."""
