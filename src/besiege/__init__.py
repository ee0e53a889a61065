"""besiege lays siege to an image classifier before somebody else does."""

__version__ = "0.1.0"
