"""Who may call what: bearer tokens from a file, each with a name and roles, or client certificates. Knows no service and no gRPC.

The file is TOML, one table for each token::

    [[tokens]]
    name = "search-team"
    token = "a long random text"            # or its hash: sha256 = "64 hexadecimal digits"
    roles = ["generate"]                    # generate, admin, or both

It is read again when it changes: a token that is taken out is refused from the next call on.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from knnlm.errors import InvalidInput
from knnlm_server.errors import RoleMissing, TokenMissing
from knnlm_server.watched_files import WatchedFiles

GENERATE, ADMIN = "generate", "admin"
ROLES = frozenset({GENERATE, ADMIN})
SHORTEST_TOKEN = 16

_BEARER = "bearer "
_KEYS = {"name", "token", "sha256", "roles"}

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Caller:
    """Who calls, and what for. ``name`` is the tenant: callers of different names share no computed prefix."""

    name: str
    roles: frozenset[str]

    def require(self, role: str) -> None:
        """Raise :class:`RoleMissing` where the caller has not this role."""
        if role not in self.roles:
            raise RoleMissing(f"The token of {self.name!r} has not the role {role!r}; ask the server's operator for one that has.")


class Access(Protocol):
    """Decides who calls."""

    @property
    def asks_for_tokens(self) -> bool:
        """Whether a call without a token is refused."""

    def caller(self, metadata: Metadata, certified: str = "") -> Caller:
        """Who sent a call with this metadata; raises :class:`TokenMissing`.

        ``certified``: the name in the client's certificate, which TLS has checked; empty where there is none.
        """


class OpenAccess:
    """Everyone may do everything that a port offers; callers are told apart by their certificates, where they have one."""

    asks_for_tokens = False

    def caller(self, metadata: Metadata, certified: str = "") -> Caller:
        """See :meth:`Access.caller`."""
        return Caller(certified, ROLES)


@dataclass(frozen=True)
class _Token:
    """A caller and the SHA-256 of its token: hashes are of one length, which constant-time comparison needs."""

    digest: bytes
    caller: Caller


class TokenAccess:
    """Callers by bearer tokens, whatever their certificates say; raises :class:`InvalidInput` for a file that can't be used."""

    asks_for_tokens = True

    def __init__(self, path: Path) -> None:
        self._tokens = WatchedFiles([path], lambda: read_tokens(path))

    def caller(self, metadata: Metadata, certified: str = "") -> Caller:
        """See :meth:`Access.caller`. Takes equally long for every token that is wrong."""
        digest = hashlib.sha256(_bearer(metadata)).digest()
        # No early end: how long it takes must not tell which token was the right one, or how nearly.
        matches = [token.caller for token in self._tokens.current() if hmac.compare_digest(token.digest, digest)]
        if not matches:
            raise TokenMissing("The call's bearer token is not known to this server; ask its operator for one.")
        return matches[0]


def certified_name(properties: Mapping[str, Iterable[bytes]]) -> str:
    """The name that a client's certificate gives its holder: the common name, else the first alternative one; empty without any.

    ``properties``: what gRPC knows of the connection (its ``auth_context``).
    """
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        names = [name.decode(errors="backslashreplace") for name in properties.get(key, ())]
        if names and names[0]:
            return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in names[0])  # it goes to the log
    return ""


def _bearer(metadata: Metadata) -> bytes:
    values = [value if isinstance(value, bytes) else value.encode() for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not values[0][: len(_BEARER)].lower() == _BEARER.encode():
        raise TokenMissing("The call has no bearer token; send the metadatum 'authorization: Bearer TOKEN', once.")
    return values[0][len(_BEARER) :].strip()


def read_tokens(path: Path) -> Sequence[_Token]:
    """The tokens of a file, at least one; raises :class:`InvalidInput` (field ``tokens``)."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput("tokens", f"is {path}, which can't be read: {error.strerror}.") from error
    except ValueError as error:  # no UTF-8 or no TOML; what it says of the content would show tokens
        raise InvalidInput("tokens", f"is {path}, which is not a TOML file.") from error
    tables = content.pop("tokens", [])
    if content or not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise InvalidInput("tokens", f"is {path}, which must hold tables [[tokens]], at least one, and nothing else.")
    tokens = [_token(table, f"is {path}, whose token number {number}") for number, table in enumerate(tables, start=1)]
    for what, values in (("name", [token.caller.name for token in tokens]), ("token", [token.digest for token in tokens])):
        if len(set(values)) < len(values):
            raise InvalidInput("tokens", f"is {path}, in which two tokens have the same {what}.")
    return tokens


def _token(table: dict[str, Any], where: str) -> _Token:
    unknown = sorted(set(table) - _KEYS)
    _require(not unknown, f"{where} has the unknown key {', '.join(unknown)}; there are {', '.join(sorted(_KEYS))}.")
    name, roles = table.get("name"), table.get("roles")
    _require(isinstance(name, str) and bool(name.strip()), f"{where} has no name.")
    _require(
        isinstance(roles, list) and bool(roles) and all(isinstance(role, str) and role in ROLES for role in roles),
        f"{where} must have roles, a list of {' and '.join(sorted(ROLES))}.",
    )
    _require(("token" in table) != ("sha256" in table), f"{where} must have either a token or its sha256.")
    assert isinstance(name, str)
    return _Token(_digest(table, where), Caller(name, frozenset(roles or ())))


def _digest(table: dict[str, Any], where: str) -> bytes:
    if "sha256" in table:
        digits = table["sha256"]
        _require(
            isinstance(digits, str) and re.fullmatch("[0-9a-fA-F]{64}", digits) is not None,
            f"{where} has a sha256 that is not 64 hexadecimal digits.",
        )
        return bytes.fromhex(digits)
    token = table["token"]
    _require(
        isinstance(token, str) and len(token) >= SHORTEST_TOKEN and token.isascii() and token.isprintable() and token == token.strip(),
        f"{where} must be a text of at least {SHORTEST_TOKEN} printable ASCII characters without a space at either end.",
    )
    return hashlib.sha256(token.encode()).digest()


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise InvalidInput("tokens", problem)
