"""A replica as a process of its own, so that it can be killed: python replica.py unix:/path name."""

import asyncio
import sys

from services.mesh.serve import Offer, Server, stop_requested, unary
from tenfold.router.v1 import router_pb2, router_pb2_grpc


class Router(router_pb2_grpc.RouterServiceServicer):
    def __init__(self, name):
        self._name = name

    @unary("tenfold.router.v1.RouterService/Predict")
    async def Predict(self, call):
        await asyncio.sleep(0.02)  # so that some calls are in flight at any moment
        return router_pb2.PredictResponse(served_by=router_pb2.ServedBy(tier=self._name))


async def main(listen, name):
    add = router_pb2_grpc.add_RouterServiceServicer_to_server
    server = Server(listen, [Offer("tenfold.router.v1.RouterService", Router(name), add)])
    await server.start()
    await server.ready()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await stop_requested()
    await server.stop(lame_duck_s=0, grace_s=0)


asyncio.run(main(*sys.argv[1:]))
