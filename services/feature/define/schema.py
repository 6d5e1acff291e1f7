"""What a stored row means: the names, order and types of its columns, and a hash that stands for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_TTL_S = 1e10  # three centuries; moments that far away still fit into 64 bits of microseconds


@dataclass(frozen=True, slots=True)
class ViewSchema:
    """One feature view as the online store knows it.

    entity: the entity whose id is the key, for example "tailnum".
    columns: float32 columns in the order they are stored.
    ttl_s: age in seconds at which a row expires; 0 for never.
    defaults: what readers get where a value is null, missing or expired, one per column, None for NaN; or empty.
    meaning: View.fingerprint of the definition that the rows were computed from, empty where it is not known.
    schema_hash: first 8 bytes of a SHA-256 over name, entity, columns and defaults, as an unsigned integer.
    """

    name: str
    entity: str
    columns: Sequence[str]
    ttl_s: float = 0.0
    defaults: Sequence[float | None] = ()
    meaning: str = field(default="", compare=False)
    schema_hash: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError(f"view {self.name!r} must have at least 1 column, got 0")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"view {self.name!r} must not repeat a column, got {list(self.columns)}")
        if not 0 <= self.ttl_s <= MAX_TTL_S:
            raise ValueError(f"view {self.name!r} must have a ttl_s from 0 to {MAX_TTL_S:g}, got {self.ttl_s}")
        if self.defaults and len(self.defaults) != len(self.columns):
            raise ValueError(f"view {self.name!r} must have a default per column, got {len(self.defaults)}")
        floats = tuple(None if default is None else float(default) for default in self.defaults)
        object.__setattr__(self, "defaults", floats)
        defaults = [f"{default!r}" for default in floats] if self.has_defaults else []
        text = "\n".join(("tenfold.view.1", self.name, self.entity, *self.columns, *defaults))
        digest = hashlib.sha256(text.encode()).digest()
        object.__setattr__(self, "schema_hash", int.from_bytes(digest[:8], "little"))

    @property
    def has_defaults(self) -> bool:
        return any(default is not None for default in self.defaults)
