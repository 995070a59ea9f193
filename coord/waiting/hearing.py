"""What a group of waiters hears of the bell: the rows it waits for, and the table as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

    from coord.hints.bell import Bell
    from coord.hints.channels import Channels
    from coord.postgresql.schemas import Schemas
    from coord.target import Key
    from coord.waiting.group import Group


class _Ear(NamedTuple):
    """A bell's listener for one row, or with no key for the table."""

    group: Group
    key: Key | None

    def listening(self) -> None:
        """Whatever was rung before was not heard."""
        if self.key is not None:
            self.group.heard(self.key)

    def rung(self) -> None:
        self.group.rung(self.key)


class Hearing:
    """The bell, as far as it concerns the rows of one mapped class in one schema."""

    def __init__(self, bell: Bell, channels: Channels, mapper: Mapper[Any], schemas: Schemas) -> None:
        self._bell = bell
        self._channels = channels
        self._mapper = mapper
        self._schemas = schemas
        self._table = channels.table(mapper, schemas)
        self._ear: _Ear | None = None
        self._rows: dict[Key, bytes] = {}
        """How those are called that are listened to."""

    def listen(self, group: Group, key: Key) -> bool:
        """Hear the row from now on; whether the group will be told to look at it when that is so."""
        if self._ear is None:
            self._ear = _Ear(group, None)
            self._bell.listen(self._table, self._ear)
        row = self._rows[key] = self._channels.row(self._mapper, self._schemas, key)
        self._bell.listen(row, _Ear(group, key))
        return self._bell.connected

    def leave(self, group: Group, key: Key) -> None:
        self._bell.leave(self._rows.pop(key), _Ear(group, key))

    def close(self) -> None:
        """Hear the table no more; the rows are left one by one."""
        if self._ear is not None:
            self._bell.leave(self._table, self._ear)
