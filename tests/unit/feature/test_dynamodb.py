"""What of the DynamoDB table needs no DynamoDB."""

from __future__ import annotations

import re

import pytest

from services.feature.online.dynamocalls import Place
from services.feature.online.dynamodb import MAX_COMPARED, MAX_FIELDS, update


def test_a_url_names_region_table_and_how_it_is_read() -> None:
    assert Place.parse("dynamodb://eu-west-1/tenfold.features") == Place("eu-west-1", "tenfold.features")
    url = "dynamodb://local/abc?endpoint=http://127.0.0.1:8000&consistent=true&create=true"
    assert Place.parse(url) == Place("local", "abc", "http://127.0.0.1:8000", consistent=True, create=True)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://eu-west-1/abc", "got scheme 'redis'"),
        ("dynamodb:///abc", "got region ''"),
        ("dynamodb://eu-west-1:80/abc", "got region 'eu-west-1:80'"),
        ("dynamodb://eu-west-1/ab", "got 'ab'"),
        ("dynamodb://eu-west-1/abc/def", "got 'abc/def'"),
        ("dynamodb://eu-west-1/abc?endpoint=localhost:8000", "got endpoint 'localhost:8000'"),
        ("dynamodb://eu-west-1/abc?endpoint=http://", "got endpoint 'http"),
        ("dynamodb://eu-west-1/abc?consistent=yes", "got consistent='yes'"),
        ("dynamodb://eu-west-1/abc?creat=true", "got creat"),
        ("dynamodb://eu-west-1/abc?create", "bad query field"),
        ("dynamodb://[/abc", "Invalid IPv6"),
    ],
)
def test_a_url_that_cannot_be_right_is_told_with_what_is_allowed(url: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"must be dynamodb://<region>/<table>") as caught:
        Place.parse(url)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "url", ["dynamodb://id:s3cret@eu-west-1/abc", "dynamodb://r/abc?endpoint=http://id:s3cret@localhost"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="belong in the environment") as caught:
        Place.parse(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("value", [None, b"1"])
def test_the_largest_update_of_a_map_fits_into_what_an_expression_holds(value: bytes | None) -> None:
    """300 operators and 4 KB: a limit of the service that the emulator does not have."""
    before = {f"view{i}": value for i in range(MAX_COMPARED)}
    parameters = update(before, {f"view{i}": b"2" for i in range(MAX_FIELDS)})
    for expression in (parameters["UpdateExpression"], parameters["ConditionExpression"]):
        assert len(expression) <= 4096
        assert len(re.findall(r"=|AND|attribute_not_exists", expression)) <= 300
    assert len(parameters["ExpressionAttributeNames"]) == MAX_COMPARED + MAX_FIELDS
