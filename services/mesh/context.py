"""Priority, tenant, deadline and trace <-> gRPC metadata."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable
from typing import Protocol

from services.mesh import attributes
from services.resilience.call import Caller, Priority

Metadata = tuple[tuple[str, str], ...]

MAX_LABEL_CHARS = 256  # of a tenant, a cohort and a traceparent: every hop pays for each of them


class ServerContext(Protocol):
    """The part of grpc.aio.ServicerContext that both transports have and we use."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...
    def time_remaining(self) -> float | None: ...


def caller_of(context: ServerContext) -> Caller:
    """Who is calling, after the metadata that the gateway stamped."""
    metadata = dict(context.invocation_metadata() or ())
    remaining_s = context.time_remaining()
    # grpcio reports the absence of a deadline as None, or as centuries
    deadline = math.inf if remaining_s is None or remaining_s > 1e9 else time.monotonic() + remaining_s
    return Caller(
        priority=Priority.parse(_text(metadata.get(attributes.PRIORITY))),
        deadline=deadline,
        tenant=_label(metadata.get(attributes.TENANT)) or "public",
        cohort=_label(metadata.get(attributes.COHORT)),
        traceparent=_label(metadata.get(attributes.TRACEPARENT)),
        degraded_reason=_text(metadata.get(attributes.DEGRADED_REASON)) or "",
    )


def metadata_of(caller: Caller, *more: tuple[str, str]) -> Metadata:
    """What travels with a call made on behalf of `caller`. The deadline travels as the call's timeout."""
    metadata = [(attributes.PRIORITY, caller.priority.label), (attributes.TENANT, caller.tenant)]
    if caller.cohort:
        metadata.append((attributes.COHORT, caller.cohort))
    if caller.traceparent:
        metadata.append((attributes.TRACEPARENT, caller.traceparent))
    return (*metadata, *more)


def on_behalf_of(callers: Iterable[Caller]) -> Caller:
    """One caller for a batch: the highest priority and the latest deadline among its members.

    Each member still gives up at its own deadline; the batch itself is worth running as long as one waits for it.
    The trace is that of the first member whose trace is sampled: a batch can join only one.
    """
    members = list(callers)
    first = members[0]
    if len(members) == 1:
        return first
    sampled = next((caller.traceparent for caller in members if is_sampled(caller.traceparent)), first.traceparent)
    tenants = {caller.tenant for caller in members}
    return Caller(
        priority=max(caller.priority for caller in members),
        deadline=max(caller.deadline for caller in members),
        tenant=first.tenant if len(tenants) == 1 else "mixed",
        cohort="",
        traceparent=sampled,
    )


def sampled_traceparent() -> str:
    """A new trace that is to be recorded, whatever share of the others is: "00-<trace id>-<span id>-01"."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def is_sampled(traceparent: str) -> bool:
    """Whether W3C trace context says that this trace is recorded: bit 0 of its last byte."""
    return len(traceparent) == 55 and traceparent[-1] in "13579bdf"


def _label(value: str | bytes | None) -> str:
    """What can be sent on with further calls; anything else counts as not said.

    Calls share what they are sent with: a value that cannot travel would fail those of others.
    """
    if not value:
        return ""
    text = (_text(value) or "").strip()
    return text if len(text) <= MAX_LABEL_CHARS and text.isascii() and text.isprintable() else ""


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
