"""Messages a person reads: errors as one line, and no passwords in them."""

from __future__ import annotations

import errno
import re
import socket
import ssl

# The names of parameters in an address whose values are secrets, such as ?password=, &access_token=, X-Amz-Signature=.
_SECRET_PARAMETER = (
    r"[\w.%-]*(?:password|passwd|pwd|passphrase|secret|token(?!s)|signature|credential|api[-_]?key|access[-_]?key)"
    r"[\w.-]*|sig|key|auth|pass|AWSAccessKeyId|odbc_connect"
)
_SECRETS = (
    # scheme://user:SECRET@host. A secret may itself hold an @, and in a database's address a slash; a port is none.
    (re.compile(r"(://[^\s/?#:@\[]*):(?:[^\s/?#]*|(?!\d+[/?#])[^\s@]*)@"), r"\1:***@"),
    # https://SECRET@host: a user alone may be a token. Other schemes have names there, as in abfss://container@account.
    (re.compile(r"(https?://)[^\s/?#:@]+@", re.IGNORECASE), r"\1***@"),
    (re.compile(rf"([?&;#](?:{_SECRET_PARAMETER})=)[^\s&#;'\"<>)]+", re.IGNORECASE), r"\1***"),
)
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH)
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)


class Refused(ValueError):
    """A service has answered that it will not do what was asked of it, however often that is asked again."""


def without_passwords(text: str) -> str:
    """The same text, with `***` for every password, token and signature in the addresses it holds."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; passwords in addresses are left out."""
    return without_passwords((str(error).strip() or type(error).__name__).splitlines()[0])


def reason(error: BaseException) -> str:
    """Why a service cannot be used, in a few words: what the network says at the root of it, else the first line.

    Libraries wrap "Connection refused" into half a page, and a database's error into a note about autoflush.
    """
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    for one in chain:
        if isinstance(said := getattr(one, "orig", None), BaseException):  # SQLAlchemy's: what the database has said
            return first_line(said)
    root = chain[-1]
    if isinstance(root, _NETWORK) or (isinstance(root, OSError) and root.errno in _UNREACHABLE):
        return without_passwords(root.strerror or first_line(root))
    if type(root).__module__.startswith("urllib3"):  # as in "too many 503 error responses"
        return first_line(root)
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(raised as a result of")]
    return without_passwords(lines[0].strip()) if lines else type(error).__name__
