"""Events of the log as columns and as bytes."""

from __future__ import annotations

import numpy as np
import pytest

from services.feature.define.definition import Source, Value
from services.feature.stream.archive import ArchiveError, Range, path_of
from services.feature.stream.log import Logged, decode
from services.feature.stream.logged import events_of


def source(path: str = "rides/*.parquet") -> Source:
    return Source(
        "rides", path, "begun_us", "known_us", "ride", ("driver", "city"), ("fare", Value("x", "fare")), ("app",)
    )


def test_columns_are_the_sources_and_what_an_event_lacks_is_null() -> None:
    events = events_of(
        source(),
        [
            Logged(3, 5, 6, {"driver": "d"}, {"app": "web"}, {"fare": 0.0}),
            Logged(4, 7, 8, {"city": "c", "gone": "g"}, {"gone": "g"}, {"gone": 1.0}),
        ],
    )
    assert (events.source, len(events)) == ("rides", 2)
    assert [events.sequence.tolist(), events.event_us.tolist(), events.known_us.tolist()] == [[3, 4], [5, 7], [6, 8]]
    assert events.entities == {"driver": ["d", None], "city": [None, "c"]}
    assert events.labels == {"app": ["web", None]}
    assert list(events.values) == ["fare"]
    assert events.values["fare"][1].tolist() == [False, True]
    assert events.values["fare"][0][0] == 0.0


def test_no_events_have_columns_of_the_right_types() -> None:
    events = events_of(source(), [])
    assert events.sequence.dtype == np.int64
    assert events.values["fare"][0].dtype == np.float64
    assert events.values["fare"][1].dtype == np.bool_


@pytest.mark.parametrize("entry", [None, b"", b"\x01", b"\x02\x96", b"junk", b"\x01\xc1"])
def test_what_is_no_event_is_none(entry: bytes | None) -> None:
    assert decode(entry) is None


def test_a_file_of_the_archive_is_where_its_sources_pattern_looks() -> None:
    name = "log-rides-0000000000000001-0000000000000500"
    assert path_of(source(), Range(1, 500)) == f"rides/{name}.parquet"
    assert path_of(source("rides/2013-*.parquet"), Range(1, 500)) == f"rides/2013-{name}.parquet"
    assert path_of(source("rides/**/*.parquet"), Range(1, 500)) == f"rides/{name}/{name}.parquet"
    for path in ("rides.parquet", "rides/[ab]*.parquet", "rides/?*.parquet"):
        with pytest.raises(ArchiveError, match="its path must have a \\*"):
            path_of(source(path), Range(1, 500))
