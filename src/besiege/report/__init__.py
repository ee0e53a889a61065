"""Pages made of records. Imports no torch."""
