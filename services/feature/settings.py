"""What the feature service needs to know of where it runs, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from services.feature.online.cache import CacheLimits
from services.feature.online.tables import check_url
from services.mesh.settings import PREFIX, ServiceSettings, SettingsError
from services.resilience.coalesce import Limits

_LEAST_CACHE_BYTES = 2**20
_MOST_AHEAD_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSettings(ServiceSettings):
    """Each field is read from TENFOLD_<NAME>.

    store: "unix:///path/valkey.sock", "redis://[user:password@]host[:port][/database]" (rediss for TLS),
        "redis+cluster://[user:password@]host:port[,host:port...]" or "dynamodb://...": see online/tables.py.
    store_timeout_s: how long the store may take for one read, seconds; a call with less time left waits less.
    refresh_s: how often the list of views is read again, seconds.
    max_rows: rows of one request, over all its views.
    max_batch, max_in_flight, max_waiting: how calls share reads of the store: see services/resilience/coalesce.py.
    cache_entries, cache_bytes: how many rows are kept in memory, and their size; 0 entries turn that off.
    cache_max_age_s: longest use of a row in memory, seconds, whatever its store says: see online/cache.py.

    Of the views that are maintained by stream, see stream/streams.py:
    events_durability: "disk" takes events only while the store keeps what it acknowledged through a crash; "memory"
        takes them anyway, and a crash of the store loses some.
    max_log_events: events that a source's log may hold, waiting to be applied and archived; more are refused.
    max_events: of one request. events_timeout_s: how long the store may take to keep them, seconds.
    max_ahead_s: how far an event may be in the future of our clock, seconds. replay: whether it may be at any time.
    apply: whether this process applies events; one of those that may does, and others wait to take over.
    lease_s: how long they wait after the last sign of life, seconds.
    archive: the folder, or URL, that the log is written to, the one that the sources' paths are below; empty for not
        at all. A log that is not archived is full one day.
    served: the folder that a sample of what is served goes to, for `tenfold features check`; empty for none.
    served_share: of answers that are in the sample.
    archive_least: events that make it worth a file. archive_s: how often that is looked at, seconds.
    """

    store: str
    store_timeout_s: float = 0.25  # a read takes under a millisecond; a caller that waits longer does better degrading
    refresh_s: float = 2.0
    max_rows: int = 4096
    max_batch: int = 64
    max_in_flight: int = 2
    max_waiting: int = 1024
    cache_entries: int = 20_000
    cache_bytes: int = 64 * 2**20
    cache_max_age_s: float = 5.0
    events_durability: str = "disk"
    max_log_events: int = 1_000_000
    max_events: int = 1024
    events_timeout_s: float = 2.0
    max_ahead_s: float = 300.0  # clocks that nobody looks after are rarely further apart
    replay: bool = False
    apply: bool = True
    lease_s: float = 3.0
    archive: str = ""
    archive_least: int = 10_000
    archive_s: float = 60.0
    served: str = ""
    served_share: float = 0.01

    def __post_init__(self) -> None:
        ServiceSettings.__post_init__(self)  # super() does not work in a class that dataclass made anew for its slots
        try:
            check_url(self.store)
        except ValueError as error:
            raise SettingsError(f"{PREFIX}STORE: {error}") from None
        if self.events_durability not in ("disk", "memory"):
            raise ValueError(f"{PREFIX}EVENTS_DURABILITY must be disk or memory, got {self.events_durability!r}")
        for name in ("max_log_events", "max_events", "archive_least"):
            if getattr(self, name) < 1:
                raise ValueError(f"{PREFIX}{name.upper()} must be at least 1, got {getattr(self, name)}")
        for name in ("store_timeout_s", "refresh_s", "cache_max_age_s", "events_timeout_s", "lease_s", "archive_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{PREFIX}{name.upper()} must be above 0 s, got {getattr(self, name)}")
        if not 0 <= self.max_ahead_s <= _MOST_AHEAD_S:
            raise ValueError(f"{PREFIX}MAX_AHEAD_S must be 0 to {_MOST_AHEAD_S:g} s, got {self.max_ahead_s}")
        if self.max_rows < 1:
            raise ValueError(f"{PREFIX}MAX_ROWS must be at least 1, got {self.max_rows}")
        if self.cache_entries < 0:
            raise ValueError(f"{PREFIX}CACHE_ENTRIES must be at least 0, got {self.cache_entries}")
        if self.cache_bytes < _LEAST_CACHE_BYTES:
            raise ValueError(f"{PREFIX}CACHE_BYTES must be at least {_LEAST_CACHE_BYTES}, got {self.cache_bytes}")
        if not 0 < self.served_share <= 1:
            raise ValueError(f"{PREFIX}SERVED_SHARE must be above 0 and at most 1, got {self.served_share}")
        self.limits()
        self.cache_limits()

    def limits(self) -> Limits:
        return Limits(self.max_batch, self.max_in_flight, self.max_waiting)

    def cache_limits(self) -> CacheLimits | None:
        """None where nothing is to be kept in memory."""
        if self.cache_entries == 0:
            return None
        return CacheLimits(self.cache_entries, self.cache_bytes, self.cache_max_age_s)
