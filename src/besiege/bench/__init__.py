"""What an attack costs beside the bare model, and how far it gets."""
