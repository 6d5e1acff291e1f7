"""A flight as the request that asks about it."""

from __future__ import annotations

from deploy.flights.replay import Flight
from tenfold.router.v1.router_pb2 import PredictRequest, Value


def request_of(flight: Flight, as_of_us: int | None = None) -> PredictRequest:
    """as_of_us: the moment that ages of features are judged at; the flight's own where None."""
    return PredictRequest(
        model="flight_delay",
        entities=flight.entities,
        inputs={name: Value(number=number) for name, number in flight.inputs.items()},
        request_id=f"flight-{flight.flight_id}",
        as_of_us=flight.predict_at_us if as_of_us is None else as_of_us,
    )
