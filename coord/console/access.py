"""Who may see, and who may act: two tokens, a signed cookie, and what keeps other sites from acting for a browser."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from coord.http.jobs import MIN_TOKEN_LENGTH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request
    from starlette.responses import Response

COOKIE = "coord_console"
SESSION_SECONDS = 12 * 3600
"""After which a browser signs in again."""


class Role(StrEnum):
    READ = "read"
    """Sees what waits for what, and neither arguments nor results, statements, keys or tracebacks."""
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who has signed in."""

    role: Role
    form_token: str
    """What each of his forms carries: another site can make his browser send the cookie, and does not know this."""

    @property
    def is_full(self) -> bool:
        return self.role is Role.FULL


class Access:
    """The tokens of one console. `ValueError` for one of less than 16 characters, or two that are equal."""

    def __init__(self, *, full_token: str | None, read_token: str | None) -> None:
        given = {Role.FULL: full_token, Role.READ: read_token}
        self._tokens = {role: token.encode() for role, token in given.items() if token is not None}
        for role, token in given.items():
            if token is not None and len(token) < MIN_TOKEN_LENGTH:
                least = f"{role}_token has at least {MIN_TOKEN_LENGTH} characters"
                raise ValueError(f"{least}, or is None: without any token the console is closed")
        if len({*self._tokens.values()}) < len(self._tokens):
            raise ValueError("the two tokens differ, or whoever may read may act")
        # A key for each role, by its own token: what a reader's cookie is signed with tells him nothing of the other.
        self._keys = {role: _digest(b"coord console", token) for role, token in self._tokens.items()}

    @property
    def is_closed(self) -> bool:
        """Whether there is no token, so that nobody may see anything."""
        return not self._tokens

    def role_of(self, token: str) -> Role | None:
        """Compared in constant time, with each of them."""
        offered = token.encode(errors="replace")
        matching = [role for role, known in self._tokens.items() if secrets.compare_digest(offered, known)]
        return matching[0] if matching else None

    def sign_in(self, response: Response, request: Request, role: Role) -> None:
        """Set the cookie. It has no `Path`, so that it is for where the form was sent to, whatever prefix that has."""
        payload = f"{role}.{int(time.time()) + SESSION_SECONDS}.{secrets.token_urlsafe(16)}"
        value = f"{payload}.{self._signature(role, payload)}"
        secure = request.url.scheme == "https"
        response.set_cookie(
            COOKIE, value, max_age=SESSION_SECONDS, path=None, secure=secure, httponly=True, samesite="strict"
        )

    def sign_out(self, response: Response) -> None:
        response.set_cookie(COOKIE, "", max_age=0, path=None, httponly=True, samesite="strict")

    def viewer_of(self, request: Request) -> Viewer | None:
        """By the cookie, or None: it is missing, forged, too old, or of a token that is no longer."""
        payload, _, signature = request.cookies.get(COOKIE, "").rpartition(".")
        role, _, rest = payload.partition(".")
        until, _, _ = rest.partition(".")
        if role not in self._keys:
            return None
        if not hmac.compare_digest(signature.encode(errors="replace"), self._signature(Role(role), payload).encode()):
            return None
        if int(until) < time.time():
            return None
        return Viewer(Role(role), self._signature(Role(role), f"form of {payload}"))

    def _signature(self, role: Role, payload: str) -> str:
        signed = hmac.digest(self._keys[role], payload.encode(errors="replace"), "sha256")
        return base64.urlsafe_b64encode(signed).decode().rstrip("=")


def is_from_here(request: Request) -> bool:
    """Whether a POST comes from a page of this origin, as far as the browser says; one that says nothing passes.

    Browsers compare origins themselves where they send `Sec-Fetch-Site`, which is over TLS and to localhost. Elsewhere
    the hosts are compared: a proxy that ends TLS makes another scheme of it.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host", "")


def has_form_token(viewer: Viewer, fields: Mapping[str, str]) -> bool:
    return hmac.compare_digest(fields.get("form_token", "").encode(errors="replace"), viewer.form_token.encode())


def _digest(purpose: bytes, token: bytes) -> bytes:
    return hashlib.sha256(purpose + b"\0" + token).digest()
