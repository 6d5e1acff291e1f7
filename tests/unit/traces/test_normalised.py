import pytest

from loadtest.traces.sink import Keep, normalised


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (
            {"rpc.system": "grpc", "rpc.service": "p.S", "rpc.method": "M"},
            {"rpc.system.name": "grpc", "rpc.method": "p.S/M"},
        ),
        ({"rpc.grpc.status_code": 14}, {"rpc.status_code": "UNAVAILABLE"}),
        ({"grpc.status_code": "0"}, {"rpc.status_code": "OK"}),
        ({"rpc.response.status_code": "NOT_FOUND"}, {"rpc.status_code": "NOT_FOUND"}),
        ({"rpc.service": "p.S", "rpc.method": "p.S/M"}, {"rpc.method": "p.S/M"}),
        ({"tenfold.tier": "full"}, {"tenfold.tier": "full"}),
    ],
)
def test_old_names_of_rpc_attributes_become_today_s(sent: dict[str, str | int], kept: dict[str, str]) -> None:
    assert normalised(sent) == kept  # type: ignore[arg-type]


def test_a_cap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_spans must be above 0, got 0"):
        Keep(max_spans=0)
