"""The smallest feature server in Python: ids in, one MGET, packed float32 out.

python -m loadtest.bench.feature_arms.floor_server ADDRESS STORE_PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import redis.asyncio

from loadtest.bench.feature_arms import packed

METHOD = "/bench.Floor/Get"


async def serve(address: str, store_port: int) -> None:
    store: Any = redis.asyncio.Redis(host="127.0.0.1", port=store_port)

    async def get(request: bytes, _: object) -> bytes:
        return packed.unpack(await store.mget(packed.keys(request.split(b"\n")))).tobytes()

    _, service, method = METHOD.split("/")
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.unary_unary_rpc_method_handler(get)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
