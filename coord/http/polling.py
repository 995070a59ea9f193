"""The long poll: a GET that answers when the row is no longer what the client has."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from sqlalchemy import inspect
from sqlalchemy.orm import Mapper

from coord.database.engine import AnySession
from coord.database.target import M
from coord.http.reply import PREFERENCE_APPLIED, Reply, reply

_TAGS = re.compile(r'(?:^|,)[ \t]*(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"[ \t]*(?=,|$)')
IF_NONE_MATCH = Header(alias="If-None-Match", description="The tags of what the client has, or `*`.")


class Poll:
    """One request's `If-None-Match` and `Prefer: wait=N`, against a row with a version.

    The tag is the mapper's version column, so a row without one cannot be polled.
    """

    def __init__(self, request: Request, response: Response, reply: Reply) -> None:
        self._response = response
        self._reply = reply
        known = ", ".join(request.headers.getlist("if-none-match")).strip()
        self._any = known == "*"
        self._tags = frozenset(_TAGS.findall(known))

    async def changed(self, session: AnySession, row: M) -> M | None:
        """The row, tagged, or None: the client has it, and the time it wanted to wait is up. Answer `not_modified`.

        Waits only if the client has the row as it is and sends `Prefer: wait=N`; a row with a tag that it has is
        unchanged. Raises what `Reply.row` does.
        """
        mapper: Mapper[M] = inspect(type(row))
        if mapper.version_id_col is None:
            raise ValueError(f"{mapper.class_.__name__} has no version_id_col, so its rows have no tag")
        version = mapper.get_property_by_column(mapper.version_id_col).key
        found: M | None = row
        if self._any or str(getattr(row, version)) in self._tags:
            seen = self._tags | {str(getattr(row, version))}
            key = tuple(mapper.primary_key_from_instance(row))
            found = None
            if self._reply.preference.wait:
                found = await self._reply.row(
                    session, type(row), key, until=lambda new: str(getattr(new, version)) not in seen
                )
        self._response.headers["ETag"] = f'"{getattr(found or row, version)}"'
        self._response.headers.setdefault("Cache-Control", "no-cache")  # else a cache may answer, and not wait
        return found

    def not_modified(self) -> Response:
        """304, with the tag."""
        return self._reply.with_headers(Response(status_code=304))


async def poll(
    request: Request,
    response: Response,
    reply: Annotated[Reply, Depends(reply)],
    _if_none_match: Annotated[str | None, IF_NONE_MATCH] = None,
) -> Poll:
    """A dependency: `Annotated[Poll, Depends(poll)]`."""
    return Poll(request, response, reply)


def polls() -> dict[int | str, dict[str, Any]]:
    """For a route's `responses=`: that what it answers has a tag, and that it may be waited for."""
    text = {"schema": {"type": "string"}, "required": True}
    headers = {
        "ETag": {"description": "For `If-None-Match`.", **text},
        "Cache-Control": {"description": "`no-cache`: ask before using it again.", **text},
        **PREFERENCE_APPLIED,
    }
    return {200: {"headers": headers}, 304: {"description": "The client has it", "headers": headers}}
