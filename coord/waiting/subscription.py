"""What a poller is notified of: changes of the rows that are waited for, and of the table as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

    from coord.database.schemas import Schemas
    from coord.database.target import Key
    from coord.notify.bell import Bell
    from coord.notify.channels import Channels
    from coord.waiting.poller import Poller


class _Listener(NamedTuple):
    """Of the channel of one row, or with no key of the table's."""

    poller: Poller
    key: Key | None

    def subscribed(self) -> None:
        """Messages from before were missed."""
        if self.key is not None:
            self.poller.on_subscribed(self.key)

    def on_message(self) -> None:
        self.poller.on_message(self.key)


class RowSubscription:
    """The channels that concern the rows of one mapped class in one schema."""

    def __init__(self, bell: Bell, channels: Channels, mapper: Mapper[Any], schemas: Schemas) -> None:
        self._bell = bell
        self._channels = channels
        self._mapper = mapper
        self._schemas = schemas
        self._table = channels.table(mapper, schemas)
        self._listener: _Listener | None = None
        self._rows: dict[Key, bytes] = {}
        """The channels of those that are subscribed to."""

    def listen(self, poller: Poller, key: Key) -> bool:
        """Subscribe to the row; whether `on_subscribed` of the poller will be called on confirmation."""
        if self._listener is None:
            self._listener = _Listener(poller, None)
            self._bell.listen(self._table, self._listener)
        row = self._rows[key] = self._channels.row(self._mapper, self._schemas, key)
        self._bell.listen(row, _Listener(poller, key))
        return self._bell.connected

    def leave(self, poller: Poller, key: Key) -> None:
        self._bell.leave(self._rows.pop(key), _Listener(poller, key))

    def told(self, key: Key) -> tuple[bytes, float] | None:
        """The payload of the last message about the row, and when it came."""
        return self._bell.told(self._rows[key]) if key in self._rows else None

    def close(self) -> None:
        """Leave the table; the rows are left one by one."""
        if self._listener is not None:
            self._bell.leave(self._table, self._listener)
