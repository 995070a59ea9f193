"""Connections to Redis that nobody else uses, and what is said to it at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from hiredis import pack_command
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import Connection
from redis.exceptions import RedisError, ResponseError

Command = tuple[str | bytes | int | float, ...]
"""As redis-py's `execute_command` takes it; the command's name is one word."""
Commands = Sequence[Command]

ANSWER_TIMEOUT_SECONDS = 2.0
"""After which an answer is not waited for any more, nor a connection used that owes one."""
CONNECT_TIMEOUT_SECONDS = 2.0

# Each exchange is bounded by its user. `socket_timeout` would do so by `asyncio.wait_for`, which before Python 3.12
# may swallow a cancellation (python/cpython#86296): a task that is cancelled to close would never end.
_OWN: dict[str, Any] = {
    "socket_timeout": None,
    "health_check_interval": 0,
    "retry": None,
    "retry_on_timeout": False,
    "decode_responses": False,
    "protocol": 2,
}


def connector(pool: ConnectionPool) -> Callable[[], Connection]:
    """Makes connections to where the pool's go, for one user each: no retries, no limits, answers are bytes."""
    options = {"socket_connect_timeout": CONNECT_TIMEOUT_SECONDS, **pool.connection_kwargs, **_OWN}
    options["retry_on_error"] = []  # redis-py adds to it
    made: Any = pool.connection_class
    return partial(made, **options)


async def exchange(connection: Connection, commands: Commands) -> list[Any]:
    """The answers, refusals among them; what is not answered in time closes the connection.

    A pipeline of redis-py's costs twice the processor time of the same commands on a connection of its own.
    """
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            await connection.connect()  # type: ignore[no-untyped-call]  # unless it is
            await connection.send_packed_command(packed(commands))
            return [await _answer(connection) for _ in commands]
    except TimeoutError:
        await connection.disconnect(nowait=True)
        raise TimeoutError(f"Redis has not answered for {ANSWER_TIMEOUT_SECONDS:g} s") from None
    except BaseException:
        await connection.disconnect(nowait=True)
        raise


def packed(commands: Commands) -> bytes:
    """As Redis reads them."""
    return b"".join(map(pack_command, commands))  # type: ignore[arg-type]  # its stub knows of one part only


async def _answer(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


async def close_client(client: Redis) -> None:
    """Its connections are closed, also those in use; whatever Redis does about it."""
    with suppress(RedisError, OSError):
        await client.aclose()
