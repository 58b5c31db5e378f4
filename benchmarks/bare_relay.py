"""Bare ASGI and aiohttp: what a relay costs that only relays. `python bare_relay.py PORT UPSTREAM`"""

from __future__ import annotations

import sys
from typing import Any

import aiohttp
import uvicorn


def application(upstream: str) -> Any:
    """Posts on to one upstream and passes the answer back as it comes."""
    session: aiohttp.ClientSession | None = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal session
        if session is None:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
            )
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        headers = {"content-type": "application/json"}
        async with session.request(scope["method"], upstream + scope["path"], data=body, headers=headers) as answer:
            head = [(b"content-type", answer.headers["content-type"].encode())]
            await send({"type": "http.response.start", "status": answer.status, "headers": head})
            while data := await answer.content.readany():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def main() -> None:
    uvicorn.run(
        application(sys.argv[2]),
        port=int(sys.argv[1]),
        http="httptools",
        loop="uvloop",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        backlog=4096,
    )


if __name__ == "__main__":
    main()
