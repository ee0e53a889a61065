"""Defenses at the input."""
