"""What the installed Envoy's own API looks like, from the descriptors inside its binary.

No package of generated code has to match the binary, and none clashes with other packages' copies of the same
protos: the pool is private.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import DecodeError

from gateway.addresses import Config

BOOTSTRAP = "envoy.config.bootstrap.v3.Bootstrap"

_DIGEST_BYTES = 32
# a serialised FileDescriptorProto starts with field 1, its name: tag 0x0a, one byte of length, the name
_START = re.compile(rb"\x0a([\x08-\x7f])([A-Za-z0-9_\-./]{3,120}\.proto)", re.DOTALL)
_LAST_FIELD = 14  # of FileDescriptorProto
_VARINT, _LENGTH_DELIMITED = 0, 2


class UnknownField(ValueError):
    """The configuration says something that this Envoy does not know; the message says where."""


class Api:
    """The messages of one Envoy binary."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        by_name = {file.name: file for file in files.file}
        for name in _in_order(by_name):
            self._pool.Add(by_name[name])

    def check(self, config: Config, message: str = BOOTSTRAP) -> None:
        """Raises UnknownField where `config` is no `message`: unknown fields and values, inside Any too."""
        kind = message_factory.GetMessageClass(self._pool.FindMessageTypeByName(message))
        try:
            json_format.ParseDict(config, kind(), descriptor_pool=self._pool)
        except json_format.ParseError as error:
            raise UnknownField(_readable(str(error))) from error


def check(config: Config, binary: Path) -> None:
    """Raises UnknownField where the Envoy at `binary` knows no such field or value."""
    api(binary).check(config)


@functools.lru_cache(maxsize=2)
def api(binary: Path, cache: Path | None = None) -> Api:
    """The API of the Envoy at `binary`, from the cache folder where it was read before."""
    stat = binary.stat()
    kept = (cache or cache_folder()) / f"envoy-{stat.st_size}-{stat.st_mtime_ns}.descriptors"
    if (files := _read(kept)) is not None:
        with contextlib.suppress(TypeError):  # left by an older tenfold that read the binary otherwise
            return Api(files)
    files = extract(binary.read_bytes())
    _write(kept, files)
    return Api(files)


def cache_folder() -> Path:
    """TENFOLD_HOME/cache where that is set, else the user's cache folder."""
    if home := os.environ.get("TENFOLD_HOME"):
        return Path(home) / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenfold"


def extract(binary: bytes) -> descriptor_pb2.FileDescriptorSet:
    """Every FileDescriptorProto that a program carries; of several of one name the longest."""
    found: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    for start in _START.finditer(binary):
        size, name = start[1][0], start[2]
        if not (size <= len(name) and name[:size].endswith(b".proto")):
            continue
        file = descriptor_pb2.FileDescriptorProto()
        try:
            file.ParseFromString(binary[start.start() : _end(binary, start.start())])
        except DecodeError:
            continue
        if file.name not in found or file.ByteSize() > found[file.name].ByteSize():
            found[file.name] = file
    return descriptor_pb2.FileDescriptorSet(file=found.values())


def _end(data: bytes, start: int) -> int:
    """Where the fields that may belong to the FileDescriptorProto at `start` end."""
    end = position = start
    try:
        while True:
            tag, position = _varint(data, position)
            field, wire = tag >> 3, tag & 7
            if not 1 <= field <= _LAST_FIELD or (field == 1 and end != start):
                return end
            if wire == _LENGTH_DELIMITED:
                size, position = _varint(data, position)
                position += size
            elif wire == _VARINT:
                _, position = _varint(data, position)
            else:
                return end
            end = position
    except IndexError:
        return end


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, position


def _in_order(files: dict[str, Any]) -> Iterator[str]:
    """Names, each after those it imports."""
    seen: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        if name in seen or name not in files:
            return
        seen.add(name)
        for imported in files[name].dependency:
            yield from visit(imported)
        yield name

    for name in files:
        yield from visit(name)


def _read(kept: Path) -> descriptor_pb2.FileDescriptorSet | None:
    """What `_write` wrote; None where it is not there or damaged."""
    try:
        data = kept.read_bytes()
    except OSError:
        return None
    digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    return descriptor_pb2.FileDescriptorSet.FromString(body)


def _write(kept: Path, files: descriptor_pb2.FileDescriptorSet) -> None:
    """Whole or not at all. A cache that cannot be written is no harm: the next start takes half a second more."""
    body = files.SerializeToString()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(hashlib.sha256(body).digest() + body)
        Path(file.name).replace(kept)
    except OSError:
        return


_WAY_DOWN = re.compile(r"(?:Failed to parse \S+ field: )*")
_WHERE = re.compile(r'(?P<what>.*) at "?(?P<where>[\w.\[\]]+?)"?\.*')


def _readable(error: str) -> str:
    """The complaint of json_format without the way down to it, which it tells twice: "where: what"."""
    first = error.splitlines()[0]
    complaint = first[_WAY_DOWN.match(first).end() :]  # type: ignore[union-attr]  # matches always, if only nothing
    found = _WHERE.fullmatch(complaint)
    return f"{found['where']}: {found['what'].rstrip('.')}" if found else complaint
