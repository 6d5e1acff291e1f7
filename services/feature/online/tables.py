"""The table that a URL names."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from services.feature.online import cluster
from services.feature.online.cluster import ClusterTable
from services.feature.online.table import Table
from services.feature.online.valkey import Address, Valkey
from services.feature.online.valkey_table import ValkeyTable

_DYNAMODB = "dynamodb"


def check_url(url: str) -> None:
    """Raises ValueError saying what is allowed; the value is not repeated, as it may hold a password."""
    scheme = urlsplit(url).scheme
    if scheme in cluster.SCHEMES:
        cluster.seeds_of(url)
    elif scheme != _DYNAMODB:  # that is read by who opens it: its client is large
        Address.parse(url)


def can_be_followed(url: str) -> bool:
    """Whether `services.feature.online.tracking` can follow the changes of the table."""
    return urlsplit(url).scheme in ("redis", "unix")


@contextlib.asynccontextmanager
async def open_table(url: str) -> AsyncIterator[Table]:
    """The table, which may not be reachable yet: calls then raise Unavailable.

    url: redis://, rediss:// or unix:// for one Valkey or Redis (see Address.parse), redis+cluster:// for a cluster
    (see cluster.seeds_of), dynamodb:// for DynamoDB. Raises ValueError.
    """
    scheme = urlsplit(url).scheme
    if scheme in cluster.SCHEMES:
        async with ClusterTable(url) as nodes:
            yield nodes
    elif scheme == _DYNAMODB:
        from services.feature.online.dynamodb import DynamoTable

        async with DynamoTable.open(url) as items:
            yield items
    else:
        async with Valkey(url) as valkey:
            yield ValkeyTable(valkey)
