"""Where a DynamoDB table is, and calls to it that end as ours do.

The library's own retries are off: a second try is the table's decision, within its caller's deadline and its budget.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, HTTPClientError, ReadTimeoutError
from botocore.parsers import ResponseParserError

from services.resilience.errors import CallError, DeadlineExceeded, Reason, Refused, Unavailable

# every call runs under its caller's deadline; these only bound one whose caller waits for ever
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
_RETRY_AFTER_S = 0.5  # throughput is counted by the second
_THROTTLED = frozenset(
    {
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_ALLOWED = "must be dynamodb://<region>/<table>[?endpoint=http://host:port&consistent=true|false&create=true|false]"
_REGION = re.compile(r"[a-z0-9-]+")
_TABLE = re.compile(r"[A-Za-z0-9_.-]{3,255}")


class ConditionFailed(Exception):
    """The condition of a write did not hold; nothing was written."""


class TableExists(Exception):
    """A table of that name is there, or is being made."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which table, where, and how it is read.

    endpoint: a URL in place of the region's own; empty for that one.
    consistent: rows are read strongly consistent, at twice the price.
    create: the table is made where there is none.
    """

    region: str
    table: str
    endpoint: str = ""
    consistent: bool = False
    create: bool = False

    def __str__(self) -> str:
        return f"DynamoDB table {self.table!r} in {self.endpoint or self.region}"

    @classmethod
    def parse(cls, url: str) -> Place:
        """From "dynamodb://eu-west-1/features?consistent=true".

        Credentials come from the environment, a profile or the machine's role, never from here.
        Raises ValueError saying what is allowed.
        """
        try:
            parts = urlsplit(url)
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
            endpoint = urlsplit(options.pop("endpoint", ""))
            hidden = parts.username or parts.password or endpoint.username or endpoint.password
        except ValueError as error:
            raise ValueError(f"the store's URL {_ALLOWED}: {error}") from None
        if hidden is not None:  # not repeated, as it may be a secret
            raise ValueError(f"the store's URL {_ALLOWED}, got one with credentials: they belong in the environment")
        if parts.scheme != "dynamodb":
            raise ValueError(f"the store's URL {_ALLOWED}, got scheme {parts.scheme!r}")
        if not _REGION.fullmatch(parts.netloc):
            raise ValueError(f"the store's URL {_ALLOWED}, got region {parts.netloc!r}")
        if not _TABLE.fullmatch(table := parts.path.removeprefix("/")):
            raise ValueError(
                f"the store's URL {_ALLOWED}, with 3 to 255 of A-Z a-z 0-9 _ . - in <table>, got {table!r}"
            )
        if endpoint.geturl() and not (endpoint.scheme in ("http", "https") and endpoint.hostname):
            raise ValueError(f"the store's URL {_ALLOWED}, got endpoint {endpoint.geturl()!r}")
        consistent, create = (_flag(name, options.pop(name, "false")) for name in ("consistent", "create"))
        if options:
            raise ValueError(f"the store's URL {_ALLOWED}, got {', '.join(sorted(options))}")
        return cls(parts.netloc, table, endpoint.geturl(), consistent, create)


class Calls:
    """The operations of one table. Belongs to one event loop."""

    def __init__(self, client: Any, place: Place) -> None:
        self._client, self.place = client, place

    async def __call__(self, operation: str, **parameters: object) -> dict[str, Any]:
        """The reply, for example of "batch_get_item".

        Raises Refused where the table is throttled, DeadlineExceeded where it was silent for longer than any caller
        should wait, Unavailable where it cannot be reached, does not exist or will not have us, ValueError where an
        item is larger than it takes, and ConditionFailed or TableExists where the operation asks for that.
        """
        try:
            reply: dict[str, Any] = await getattr(self._client, operation)(**parameters)
        except ClientError as error:
            raise self._meaning(error.response.get("Error", {})) from None
        except (ConnectTimeoutError, ReadTimeoutError) as error:
            raise DeadlineExceeded(f"{self.place} did not answer: {error}") from None
        # HTTPClientError: a connection that failed. ResponseParserError: whoever answered is no DynamoDB
        except (BotoCoreError, HTTPClientError, ResponseParserError, OSError) as error:
            raise Unavailable(f"{self.place} cannot be reached: {error or type(error).__name__}") from None
        # any page with status 200 passes for the empty reply of a write that succeeded; only the service numbers them
        if "RequestId" not in reply["ResponseMetadata"]:
            raise Unavailable(f"{self.place} cannot be reached: what answered there is no DynamoDB")
        return reply

    def _meaning(self, error: dict[str, str]) -> CallError | ConditionFailed | TableExists | ValueError:
        code, message = error.get("Code", "an error without a code"), error.get("Message", "")
        if code in _THROTTLED:
            return Refused(Reason.OVERLOADED, f"{self.place} is throttled: {code}", _RETRY_AFTER_S)
        if code == "ConditionalCheckFailedException":
            return ConditionFailed()
        if code == "ResourceInUseException":
            return TableExists()
        if code == "ResourceNotFoundException":
            return Unavailable(f"{self.place} does not exist; make it, or add create=true to the store's URL")
        if code == "ValidationException" and message.startswith("Item size"):
            return ValueError(f"{self.place} takes items of up to 400 KB, and answered: {message}")
        return Unavailable(f"{self.place} answered {code}: {message}")


@contextlib.asynccontextmanager
async def connected(place: Place, connections: int) -> AsyncIterator[Calls]:
    """Calls that share a pool of connections, each made when it is first needed.

    Credentials: whatever the library finds in the environment, in a profile or in the machine's role.
    """
    config = AioConfig(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        max_pool_connections=connections,
        retries={"total_max_attempts": 1, "mode": "standard"},
        parameter_validation=False,  # our parameters have one shape; checking it again costs more than building it
        tcp_keepalive=True,
    )
    async with contextlib.AsyncExitStack() as stack:
        try:
            client = await stack.enter_async_context(
                get_session().create_client(
                    "dynamodb", region_name=place.region, endpoint_url=place.endpoint or None, config=config
                )
            )
        except (BotoCoreError, OSError) as error:
            raise Unavailable(f"{place} cannot be reached: {error}") from None
        yield Calls(client, place)


def _flag(name: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"the store's URL {_ALLOWED}, got {name}={value!r}")
    return value == "true"
