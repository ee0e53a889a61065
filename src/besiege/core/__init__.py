"""The words every method is written in. Imports torch and nothing of ours."""
