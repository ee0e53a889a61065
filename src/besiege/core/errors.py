"""The errors that a person reads."""


class BesiegeError(Exception):
    """An error whose message is one clear sentence for the user."""


class BadInput(BesiegeError, ValueError):
    """The user gave something that cannot work; the sentence names it and what would be right."""


class AccessDenied(BesiegeError, PermissionError):
    """A method asked its oracle for more than the threat model grants."""


class BadOutcome(BesiegeError):
    """An outcome that the judge refuses: the search claims what the clean target does not confirm."""
