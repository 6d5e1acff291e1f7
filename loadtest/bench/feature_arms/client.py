"""Callers of the servers, as a worker: the same loop around each server's own stub.

Calls are synchronous. A caller has a connection of its own.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from loadtest.bench.feature_arms.lines import answer
from loadtest.bench.feature_arms.sizes import COLUMNS, PER_VIEW, VIEWS

TIMEOUT_S = 10.0
_READY_S = 30.0
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)

Ask = Callable[[Sequence[str]], Any]
"""Entity ids -> what the stub makes of the answer: an array, or Feast's message."""


def floor(channel: grpc.Channel) -> Ask:
    call: Callable[..., bytes] = channel.unary_unary("/bench.Floor/Get")

    def ask(ids: Sequence[str]) -> NDArray[np.float32]:
        found = call("\n".join(ids).encode(), timeout=TIMEOUT_S)
        return np.frombuffer(found, "<f4").reshape(len(ids), -1)

    return ask


def ours(channel: grpc.Channel) -> Ask:
    from tenfold.feature.v1 import feature_pb2 as pb
    from tenfold.feature.v1 import feature_pb2_grpc

    call = feature_pb2_grpc.FeatureServiceStub(channel).GetFeatures

    def ask(ids: Sequence[str]) -> NDArray[np.float32]:
        request = pb.GetFeaturesRequest(views=[pb.ViewKeys(view=view, entity_ids=ids) for view in VIEWS])
        found = call(request, timeout=TIMEOUT_S).views
        return np.concatenate([np.frombuffer(rows.values, "<f4").reshape(-1, PER_VIEW) for rows in found], axis=1)

    return ask


def feast(channel: grpc.Channel) -> Ask:
    from feast.protos.feast.serving import ServingService_pb2 as pb
    from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
    from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value

    call = GrpcFeatureServerStub(channel).GetOnlineFeatures

    def ask(ids: Sequence[str]) -> Any:
        entities = {"entity_id": RepeatedValue(val=[Value(string_val=entity_id) for entity_id in ids])}
        return call(pb.GetOnlineFeaturesRequest(feature_service="all", entities=entities), timeout=TIMEOUT_S)

    return ask


_KINDS: dict[str, Callable[[grpc.Channel], Ask]] = {"floor": floor, "ours": ours, "feast": feast}
_callers: dict[str, list[Ask]] = {}


def connect(name: str, kind: str, address: str, callers: int) -> None:
    """Callers named `name`, each of which has had an answer."""
    _callers[name] = [_KINDS[kind](grpc.insecure_channel(address, options=_OPTIONS)) for _ in range(callers)]
    for ask in _callers[name]:
        _answered(ask)


def _answered(ask: Ask) -> None:
    """Once the server is ready: one may listen before it has reached its store."""
    until = time.monotonic() + _READY_S
    while True:
        try:
            ask(["0"])
        except grpc.RpcError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def values(name: str, ids: Sequence[str]) -> str:
    """float32 (n, 50) as hexadecimal digits, columns in the order of COLUMNS; NaN for null."""
    found = _callers[name][0](ids)
    table = found if isinstance(found, np.ndarray) else _table(found)
    return np.ascontiguousarray(table, "<f4").tobytes().hex()


def _table(found: Any) -> NDArray[np.float32]:
    """Feast's columns come in any order."""
    at = {name.split("__")[-1]: number for number, name in enumerate(found.metadata.feature_names.val)}
    columns = [found.results[at[name]].values for name in COLUMNS]
    return np.array([[_float(value) for value in column] for column in columns], np.float32).T


def _float(value: Any) -> float:
    return float(value.float_val) if value.WhichOneof("val") == "float_val" else float("nan")


def latencies(name: str, asked: int, calls: int, entities: int, seed: int) -> list[float]:
    """Seconds of each call, one after the other. entities: how many there are to ask for."""
    ask = _callers[name][0]
    return [_timed(ask, ids) for ids in itertools.islice(_requests(asked, entities, seed), calls)]


def load(name: str, asked: int, seconds: float, entities: int, seed: int) -> dict[str, Any]:
    """Every caller asks again as soon as it has its answer. A call that fails ends the run."""
    callers = _callers[name]
    requests = [_requests(asked, entities, seed + number) for number in range(len(callers))]
    taken: list[list[float]] = [[] for _ in callers]
    failures: list[Exception] = []
    until = time.perf_counter() + seconds

    def loop(number: int) -> None:
        ask, found = callers[number], taken[number]
        try:
            for ids in requests[number]:
                found.append(_timed(ask, ids))
                if time.perf_counter() >= until:
                    return
        except grpc.RpcError as error:
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(len(callers))]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    every = [one for found in taken for one in found]
    return {"calls": len(every), "s": time.perf_counter() - started, "p99_s": float(np.quantile(every, 0.99))}


def _timed(ask: Ask, ids: Sequence[str]) -> float:
    started = time.perf_counter()
    ask(ids)
    return time.perf_counter() - started


def _requests(asked: int, entities: int, seed: int) -> Iterator[list[str]]:
    """Ids without end. None comes again before all were asked for: a cache finds only what is hot for it by chance."""
    everyone = [str(i) for i in np.random.default_rng(seed).permutation(entities).tolist()]
    return itertools.cycle([everyone[start : start + asked] for start in range(0, entities - asked + 1, asked)])


if __name__ == "__main__":
    answer({"connect": connect, "values": values, "latencies": latencies, "load": load})
