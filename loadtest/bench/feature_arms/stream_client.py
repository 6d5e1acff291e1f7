"""A producer of events, and a reader who waits for them, as a worker.

One event of each request is watched: its sequence number is a value whose latest the view tells.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from loadtest.bench.feature_arms.lines import answer
from loadtest.bench.feature_arms.stream_view import COUNTED_AT, LATEST_AT, build
from tenfold.feature.v1 import feature_pb2 as pb
from tenfold.feature.v1 import feature_pb2_grpc

PER_REQUEST = 10
ACCOUNTS = 1_000
_PER_BURST_REQUEST = 1_000
_TIMEOUT_S = 120.0
_GIVE_UP_S = 30.0
_AT_ONCE = 32  # watched events that are asked for together
_IDLE_S = 0.001


@dataclass(slots=True)
class _Watched:
    """Moments are of time.perf_counter, 0 for not yet."""

    sequence: int
    account: str
    sent_s: float
    acknowledged_s: float = 0.0
    seen_s: float = 0.0


class _Client:
    def __init__(self, address: str) -> None:
        self._stub = feature_pb2_grpc.FeatureServiceStub(grpc.insecure_channel(address))
        self.read_s: list[float] = []

    def write(self, requests: Iterator[pb.WriteEventsRequest]) -> Iterator[pb.WriteEventsResponse]:
        found: Iterator[pb.WriteEventsResponse] = self._stub.WriteEvents(requests, timeout=_TIMEOUT_S)
        return found

    def rows(self, accounts: Sequence[str]) -> NDArray[np.float32]:
        request = pb.GetFeaturesRequest(views=[pb.ViewKeys(view="account", entity_ids=accounts)])
        began = time.perf_counter()
        found = self._stub.GetFeatures(request, timeout=_TIMEOUT_S, wait_for_ready=True)
        self.read_s.append(time.perf_counter() - began)
        return np.frombuffer(found.views[0].values, "<f4").reshape(len(accounts), -1)


def steady(address: str, rate: float, seconds: float, first: int, seed: int) -> dict[str, Any]:
    """Events at `rate` per second, in requests of PER_REQUEST, numbered from `first`.

    The seconds from when a watched event was sent, and from when it was acknowledged, until an answer showed it; those
    of each of those reads; how many events were sent, in how many seconds, and how many watched ones never showed.
    """
    client = _Client(address)
    _ready(client)
    watched: deque[_Watched] = deque()
    every: list[_Watched] = []
    accounts = np.random.default_rng(seed).integers(0, ACCOUNTS, round(rate * seconds)).tolist()
    began = time.perf_counter()

    def requests() -> Iterator[pb.WriteEventsRequest]:
        for at in range(0, len(accounts), PER_REQUEST):
            time.sleep(max(0.0, began + at / rate - time.perf_counter()))
            made = _request(accounts[at : at + PER_REQUEST], first + at)
            one = _Watched(first + at, str(accounts[at]), time.perf_counter())
            every.append(one)
            watched.append(one)
            yield made

    acknowledged_s: list[float] = []

    def listen() -> None:
        for _ in client.write(requests()):
            every[len(acknowledged_s)].acknowledged_s = time.perf_counter()
            acknowledged_s.append(time.perf_counter())

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    client.read_s.clear()
    while listening.is_alive() or watched:
        _look(client, watched)
        if time.perf_counter() > began + seconds + _GIVE_UP_S:
            break
    listening.join(_GIVE_UP_S)
    seen = [one for one in every if one.seen_s and one.acknowledged_s]
    return {
        "sent": len(accounts),
        "seconds": (acknowledged_s[-1] if acknowledged_s else time.perf_counter()) - began,
        "unseen": -(-len(accounts) // PER_REQUEST) - len(seen),
        "from_sent_s": [one.seen_s - one.sent_s for one in seen],
        # what is readable before its acknowledgement is through did not wait at all
        "from_acknowledged_s": [max(0.0, one.seen_s - one.acknowledged_s) for one in seen],
        "read_s": client.read_s,
    }


def _look(client: _Client, watched: deque[_Watched]) -> None:
    """Reads for some of those who are waited for, the oldest first, and takes out those who are there."""
    asked = [watched[at] for at in range(min(_AT_ONCE, len(watched)))]
    if not asked:
        time.sleep(_IDLE_S)
        return
    latest = client.rows([one.account for one in asked])[:, LATEST_AT]
    now_s = time.perf_counter()
    for one, sequence in zip(asked, latest.tolist(), strict=True):
        if sequence >= one.sequence:
            one.seen_s = now_s
            watched.remove(one)


def burst(address: str, events: int, first: int, seed: int, before: int) -> dict[str, Any]:
    """Events as fast as they are taken. before: how many were counted already.

    The seconds until all were acknowledged, and until all were counted; and how many are counted then.
    """
    client = _Client(address)
    _ready(client)
    accounts = np.random.default_rng(seed).integers(0, ACCOUNTS, events).tolist()
    starts = range(0, events, _PER_BURST_REQUEST)
    requests = [_request(accounts[at : at + _PER_BURST_REQUEST], first + at) for at in starts]
    began = time.perf_counter()
    for _ in client.write(iter(requests)):
        pass
    acknowledged_s = time.perf_counter() - began
    last = {str(account): first + at for at, account in enumerate(accounts)}
    few = list(last)[-_AT_ONCE:]
    wanted = np.array([last[account] for account in few], np.float32)
    _until(lambda: bool((client.rows(few)[:, LATEST_AT] >= wanted).all()))
    everyone = [str(account) for account in range(ACCOUNTS)]
    _until(lambda: _counted(client, everyone) >= before + events)
    return {
        "acknowledged_s": acknowledged_s,
        "counted_s": time.perf_counter() - began,
        "counted": _counted(client, everyone),
    }


def _counted(client: _Client, accounts: Sequence[str]) -> int:
    return int(np.nansum(client.rows(accounts)[:, COUNTED_AT], dtype=np.float64))


def _until(holds: Any) -> None:
    """Or until it has taken too long, which the caller's numbers then show."""
    end = time.perf_counter() + _GIVE_UP_S
    while not holds() and time.perf_counter() < end:
        time.sleep(0.01)


def _ready(client: _Client) -> None:
    """Once the server knows the view."""
    end = time.perf_counter() + _GIVE_UP_S
    while True:
        try:
            client.rows(["0"])
        except grpc.RpcError:
            if time.perf_counter() > end:
                raise
            time.sleep(0.05)
        else:
            return


def _request(accounts: Sequence[int], first: int) -> pb.WriteEventsRequest:
    now_us = time.time_ns() // 1000
    return pb.WriteEventsRequest(
        source="payments",
        events=[
            pb.Event(
                sequence=first + at,
                event_us=now_us,
                known_us=now_us,
                entities={"account": str(account)},
                values={"amount": float(account % 97), "number_paid": float(first + at)},
            )
            for at, account in enumerate(accounts)
        ],
    )


if __name__ == "__main__":
    answer({"build": build, "steady": steady, "burst": burst})
