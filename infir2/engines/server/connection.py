"""Work that ends when the client goes away."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from infir2.engines.server.errors import ClientGoneError

T = TypeVar("T")


async def while_connected(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection.

    The body of `http` must have been read. Raises ClientGoneError.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
