"""One runner a family, and the judge."""
