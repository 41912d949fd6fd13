"""Errors as one line, which is how a person reads them."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return _opening(str(error).strip() or type(error).__name__)


def _opening(message: str) -> str:
    """The first line; where that ends in a colon, and so announces the next one, that one too."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    count = next((number for number, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:count]).removesuffix(":")
