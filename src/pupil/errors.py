"""The one kind of error that a user can mend; apart from the rest, so that what needs no torch does not import it."""


class UserError(ValueError):
    """A mistake the user can mend; its text is one line: what was given, what was expected, what to do."""
