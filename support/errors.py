"""What the user gave can't be used, said in one sentence."""


class InputError(ValueError):
    """Says what was given, what is needed, what to type. Commands exit with status 2."""
