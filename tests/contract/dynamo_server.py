"""DynamoDB on this machine: an emulator as a process of its own, and a server in front of it that gets in the way."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from tests.contract.table_contract import LONG_S

Body = dict[str, Any]
Forward = Callable[[Body], Awaitable[Body]]
Meddle = Callable[[str, Body, Forward], Awaitable[Body]]
"""Answers an operation, for example "BatchGetItem", with or without asking the emulator."""

# one thread: there the emulator decides and writes in one step, as the service does
_SERVE = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
fd, port = map(int, sys.argv[1:])
make_server("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), fd=fd).serve_forever()
"""


@contextlib.contextmanager
def emulator(log: Path) -> Iterator[str]:
    """The endpoint of an empty DynamoDB. Its socket listens from the start, so early calls wait rather than fail."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening, log.open("wb") as output:
        port, fd = listening.getsockname()[1], listening.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(fd), str(port)],
            pass_fds=[fd],
            stdout=output,
            stderr=output,
            env={**os.environ, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Throttled(Exception):
    """Raised by a Meddle: the table has no throughput left for this call."""


@contextlib.asynccontextmanager
async def in_front_of(endpoint: str, meddle: Meddle) -> AsyncIterator[str]:
    """The endpoint of a server where `meddle` answers."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(LONG_S)) as session:

        async def answer(request: web.Request) -> web.Response:
            target = request.headers["X-Amz-Target"]

            async def forward(body: Body) -> Body:
                headers = {name: request.headers[name] for name in ("X-Amz-Target", "Content-Type", "Authorization")}
                async with session.post(endpoint, data=json.dumps(body), headers=headers) as reply:
                    assert reply.status == 200, await reply.text()
                    return json.loads(await reply.text())

            try:
                reply = await meddle(target.rpartition(".")[2], json.loads(await request.text()), forward)
            except Throttled:
                kind = "com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException"
                return web.json_response({"__type": kind, "message": "slow down"}, status=400)
            headers = {"x-amzn-RequestId": "in-front"}
            return web.json_response(reply, content_type="application/x-amz-json-1.0", headers=headers)

        application = web.Application(client_max_size=32 * 2**20)
        application.router.add_post("/", answer)
        runner = web.AppRunner(application, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            yield f"http://127.0.0.1:{port}"
        finally:
            await runner.cleanup()
