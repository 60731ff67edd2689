"""What the user gave can't be used, said in one sentence."""


class InputError(ValueError):
    """Says what was given, what is needed, what to type. Commands exit with status 2."""


def refuse(cases: dict):
    """Raises InputError with the first sentence whose case holds. cases: sentence -> whether it does."""
    for sentence, holds in cases.items():
        if holds:
            raise InputError(sentence)


def cause_of(error: Exception) -> str:
    """Its kind and its first 300 characters, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
