"""What the feature service needs to know of where it runs, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from services.feature.valkey import Address
from services.mesh.settings import PREFIX, ServiceSettings, SettingsError
from services.resilience.coalesce import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSettings(ServiceSettings):
    """Each field is read from TENFOLD_<NAME>.

    store: "unix:///path/valkey.sock" or "redis://[user:password@]host[:port][/database]".
    store_timeout_s: how long the store may take for one read, seconds; a call with less time left waits less.
    refresh_s: how often the list of views is read again, seconds.
    max_rows: rows of one request, over all its views.
    max_batch, max_in_flight, max_waiting: how calls share reads of the store: see services/resilience/coalesce.py.
    """

    store: str
    store_timeout_s: float = 0.25  # a read takes under a millisecond; a caller that waits longer does better degrading
    refresh_s: float = 2.0
    max_rows: int = 4096
    max_batch: int = 64
    max_in_flight: int = 2
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        ServiceSettings.__post_init__(self)  # super() does not work in a class that dataclass made anew for its slots
        try:
            Address.parse(self.store)
        except ValueError as error:
            raise SettingsError(f"{PREFIX}STORE: {error}") from None
        for name in ("store_timeout_s", "refresh_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{PREFIX}{name.upper()} must be above 0 s, got {getattr(self, name)}")
        if self.max_rows < 1:
            raise ValueError(f"{PREFIX}MAX_ROWS must be at least 1, got {self.max_rows}")
        self.limits()

    def limits(self) -> Limits:
        return Limits(self.max_batch, self.max_in_flight, self.max_waiting)
