"""A sample of what was served, on disk, so that it can be recomputed from the events later.

    <folder>/<begun, microseconds since 1970>-<instance>.served    records, each after its length in 4 bytes

Taking a sample costs a request that is not in it one subtraction. A record is kept as the bytes that were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

_SUFFIX = ".served"
_MOST_WAITING = 1024  # records; more are dropped and counted
_ROWS_PER_RECORD = 64
_FLUSH_S = 2.0
_FILE_BYTES = 16 * 2**20
MAX_BYTES = 512 * 2**20
"""Of all files together; the oldest go first."""
_length = struct.Struct("<I")


class Served(msgspec.Struct, array_like=True, frozen=True):
    """Some rows of one view as they were sent: n entities, c columns.

    as_of_us: the moment they were asked for, one per row. event_us, values, status: see tenfold.feature.v1.ViewRows.
    """

    view: str
    schema_hash: int
    entity_ids: list[str]
    as_of_us: list[int]
    event_us: bytes
    values: bytes
    status: bytes


class ServedLog:
    """Keeps every 1/share-th answer. Belongs to one event loop."""

    def __init__(self, folder: Path, share: float, instance: str, max_bytes: int = MAX_BYTES) -> None:
        """share: of answers that are kept, above 0 to 1."""
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        self.dropped = 0
        self._folder, self._instance, self._max_bytes = folder, instance, max_bytes
        self._every = max(1, round(1 / share))
        self._left = self._every
        self._waiting: deque[Served] = deque()
        self._file: Path | None = None

    def takes_this(self) -> bool:
        """Whether this answer is in the sample."""
        self._left -= 1
        if self._left:
            return False
        self._left = self._every
        return True

    def keep(
        self,
        view: str,
        schema_hash: int,
        entity_ids: Sequence[str],
        as_of_us: Sequence[int] | int,
        event_us: bytes,
        values: bytes,
        status: bytes,
    ) -> None:
        """The first rows of one view's answer; a moment for all, or one per row."""
        n = min(len(entity_ids), _ROWS_PER_RECORD)
        if len(self._waiting) >= _MOST_WAITING:
            self.dropped += 1
            return
        width = len(status) // len(entity_ids)
        moments = [as_of_us] * n if isinstance(as_of_us, int) else list(as_of_us[:n])
        kept = event_us[: 8 * n], values[: 4 * width * n], status[: width * n]
        self._waiting.append(Served(view, schema_hash, list(entity_ids[:n]), moments, *kept))

    @contextlib.asynccontextmanager
    async def written(self) -> AsyncIterator[None]:
        """Within it what is kept reaches the disk every few seconds, and the rest at the end."""
        async with asyncio.TaskGroup() as tasks:
            writer = tasks.create_task(self._keep_writing())
            try:
                yield
            finally:
                writer.cancel()
        await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Writes what waits. A disk that cannot be written costs the sample, never an answer."""
        records = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not records:
            return
        encode = msgspec.msgpack.Encoder().encode
        packed = b"".join(_length.pack(len(body)) + body for body in map(encode, records))
        whole = -1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._file is None or self._file.stat().st_size > _FILE_BYTES:
                self._file = self._folder / f"{time.time_ns() // 1000}-{self._instance}{_SUFFIX}"
                self._make_room()
            whole = self._file.stat().st_size if self._file.exists() else 0
            with self._file.open("ab") as file:
                file.write(packed)
        except OSError as error:
            self.dropped += len(records)
            self._undo(whole)
            log.warning("served rows not kept", extra={"folder": str(self._folder), "reason": str(error)})

    def _undo(self, whole: int) -> None:
        """Cuts off what a full disk took a part of, so that it goes on when there is room; else begins another."""
        file, self._file = self._file, None
        if file is not None and whole >= 0:
            with contextlib.suppress(OSError):
                os.truncate(file, whole)
                self._file = file

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            if self._waiting:
                await asyncio.to_thread(self.flush)

    def _make_room(self) -> None:
        files = sorted(self._folder.glob(f"*{_SUFFIX}"))
        sizes = [file.stat().st_size for file in files]
        while files and sum(sizes) > self._max_bytes:
            files.pop(0).unlink(missing_ok=True)
            sizes.pop(0)


@contextlib.asynccontextmanager
async def keeping(folder: str, share: float, instance: str) -> AsyncIterator[ServedLog | None]:
    """A log in the folder, written while within; None where no folder is named."""
    if not folder:
        yield None
        return
    log_of_served = ServedLog(Path(folder), share, instance)
    async with log_of_served.written():
        yield log_of_served


def read(folder: Path) -> Iterator[Served]:
    """Every record, file by file in the order they were begun. What a crash cut off ends its file."""
    decode = msgspec.msgpack.Decoder(Served).decode
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        data = file.read_bytes()
        at = 0
        while at + _length.size <= len(data):
            end = at + _length.size + _length.unpack_from(data, at)[0]
            if end > len(data):
                break
            try:
                yield decode(data[at + _length.size : end])
            except msgspec.MsgspecError:
                log.warning("a record of served rows cannot be read", extra={"file": str(file), "at": at})
            at = end
