"""What WriteEvents makes of its requests, without a server."""

from __future__ import annotations

import math

import pytest

from services.feature.define.definition import Source
from services.feature.stream.ingest import IngestLimits, read_request
from services.feature.stream.log import Logged
from services.resilience.errors import BadInput
from tenfold.feature.v1 import feature_pb2 as pb

NOW_US = 1_700_000_000_000_000
LIMITS = IngestLimits(max_events=3)
SOURCE = Source(
    "rides", "rides/*.parquet", "begun_us", "known_us", "ride", ("driver", "city"), ("fare", "tip"), ("app", "zone")
)
SOURCES = {"rides": SOURCE}


def ride(sequence: int = 1, event_us: int = 5, known_us: int = 6) -> pb.Event:
    return pb.Event(sequence=sequence, event_us=event_us, known_us=known_us, entities={"driver": "d"})


def test_an_event_keeps_what_it_has_and_nothing_else() -> None:
    event = ride()
    event.values["tip"] = math.nan
    event.labels["app"] = ""
    group = read_request(pb.WriteEventsRequest(source="rides", events=[event], watermark_us=9), SOURCES, LIMITS, NOW_US)
    assert group.watermark_us == 9
    (found,) = group.events
    assert (found.sequence, found.event_us, found.known_us) == (1, 5, 6)
    assert (found.entities, found.labels) == ({"driver": "d"}, {"app": ""})
    assert list(found.values) == ["tip"]
    assert math.isnan(found.values["tip"])


def test_the_bounds_themselves_are_allowed() -> None:
    event = ride(2**63 - 1, 1, NOW_US + LIMITS.max_ahead_us)
    event.entities["city"] = "x" * 256
    event.labels["zone"] = "ü" * 128
    group = read_request(pb.WriteEventsRequest(source="rides", events=[event] * 3), SOURCES, LIMITS, NOW_US)
    assert [type(one) for one in group.events] == [Logged] * 3


def test_a_replay_may_be_of_any_future() -> None:
    request = pb.WriteEventsRequest(source="rides", events=[ride(1, 5, 2**53)], watermark_us=2**53)
    assert read_request(request, SOURCES, IngestLimits(max_ahead_us=-1), NOW_US).events[0].known_us == 2**53
    with pytest.raises(BadInput, match="not far in the server's future"):
        read_request(request, SOURCES, LIMITS, NOW_US)


def test_every_wrong_field_is_named_up_to_a_few() -> None:
    bad = pb.Event(sequence=0, event_us=0, known_us=-1, entities={"": "x", "driver": ""}, labels={"app": "y" * 300})
    with pytest.raises(BadInput) as raised:
        read_request(pb.WriteEventsRequest(source="rides", events=[bad, bad]), SOURCES, LIMITS, NOW_US)
    fields = [violation.field for violation in raised.value.violations]
    assert fields == [
        "events[0].sequence",
        "events[0].event_us",
        "events[0].known_us",
        "events[0].entities",
        "events[0].entities['driver']",
        "events[0].labels['app']",
        "events[1].sequence",
        "events[1].event_us",
    ]


def test_what_is_quoted_is_short() -> None:
    with pytest.raises(BadInput) as raised:
        read_request(pb.WriteEventsRequest(source="s" * 100_000), SOURCES, LIMITS, NOW_US)
    assert len(str(raised.value)) < 200
