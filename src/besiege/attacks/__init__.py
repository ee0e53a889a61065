"""Every attack, one file a method."""
