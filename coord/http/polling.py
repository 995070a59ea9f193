"""The long poll: a GET that answers when the row is no longer what the client has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from sqlalchemy import inspect

from coord.http.limits import WAIT
from coord.http.reply import Reply

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Mapper

    from coord.target import M

_TAG = re.compile(r'(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"')


class Poll:
    """One request's `If-None-Match` and `Prefer: wait=N`, against a row with a version.

    The tag is the mapper's version column, so a row without one cannot be polled.
    """

    def __init__(self, request: Request, response: Response, *, cap: float = WAIT) -> None:
        self._request = request
        self._response = response
        self._reply = Reply(request, response, cap=cap)
        self._cap = cap

    async def changed(self, session: AsyncSession, row: M) -> M | None:
        """The row, tagged, or None: the client has it, and the time it wanted to wait is up. Answer `not_modified`.

        Waits only if the client has the row as it is and says `Prefer: wait=N`. Raises what `Reply.row` does.
        """
        mapper: Mapper[M] = inspect(type(row))
        version = _version(mapper)
        if self._has(getattr(row, version)):
            wait = self._reply.preference.wait
            key = tuple(mapper.primary_key_from_instance(row))
            seen = {version: getattr(row, version)}
            found = await self._reply.row(session, type(row), key, columns=[version], since=seen) if wait else None
            if found is None:
                self._tag(row, version)
                return None
            row = found
        self._tag(row, version)
        return row

    def not_modified(self) -> Response:
        """304, with the tag."""
        headers = {name: self._response.headers[name] for name in ("ETag",)}
        if applied := self._reply.preference.applied(self._cap, accepted=False):
            headers["Preference-Applied"] = applied
        return Response(status_code=304, headers=headers)

    def _has(self, version: Any) -> bool:
        text = ", ".join(self._request.headers.getlist("if-none-match"))
        return text.strip() == "*" or str(version) in _TAG.findall(text)

    def _tag(self, row: object, version: str) -> None:
        self._response.headers["ETag"] = f'"{getattr(row, version)}"'


async def poll(request: Request, response: Response) -> Poll:
    """A dependency: `Annotated[Poll, Depends(poll)]`."""
    return Poll(request, response)


def _version(mapper: Mapper[Any]) -> str:
    if mapper.version_id_col is None:
        raise ValueError(f"{mapper.class_.__name__} has no version_id_col, so its rows have no tag")
    return mapper.get_property_by_column(mapper.version_id_col).key
