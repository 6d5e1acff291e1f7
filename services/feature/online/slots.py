"""Which node of a cluster has which keys: 16384 slots, and the redirections by which nodes correct a client."""

from __future__ import annotations

import functools
from binascii import crc_hqx
from collections.abc import Sequence
from typing import Any, NamedTuple

SLOTS = 16384
_TAGS_REMEMBERED = 16384  # an entity's views share a tag, and some entities are asked for often


class Node(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Redirection(NamedTuple):
    """ask: for this once, while the slot moves; otherwise the slot has moved for good."""

    slot: int
    node: Node
    ask: bool


def slot_of(key: str | bytes) -> int:
    """By the part between the first "{" and the "}" after it, where there is one and it is not empty."""
    name = key if isinstance(key, str) else key.decode(errors="surrogateescape")
    begin = name.find("{")
    if begin >= 0:
        end = name.find("}", begin + 1)
        if end > begin + 1:
            return _slot_of_tag(name[begin + 1 : end])
    return _slot_of_tag(name)


@functools.lru_cache(_TAGS_REMEMBERED)
def _slot_of_tag(tag: str) -> int:
    return crc_hqx(tag.encode(errors="surrogateescape"), 0) % SLOTS


def owners(reply: Sequence[Sequence[Any]], asked: Node) -> list[Node | None]:
    """The master of every slot, None where there is none, from the reply to CLUSTER SLOTS.

    asked: the node that replied; one that does not know its own host leaves it out.
    """
    found: list[Node | None] = [None] * SLOTS
    for first, last, master, *_ in reply:
        host = (master[0] or b"").decode()
        if host == "?":  # unknown to the node that replied
            continue
        node = Node(host or asked.host, int(master[1]))
        found[first : last + 1] = [node] * (last + 1 - first)
    return found


def redirection(told: str, asked: Node) -> Redirection | None:
    """Of an error such as "MOVED 3999 127.0.0.1:6381"; None for any other."""
    words = told.split()
    if len(words) < 3 or words[0] not in ("MOVED", "ASK"):
        return None
    host, _, port = words[2].rpartition(":")
    if not (words[1].isdigit() and port.isdigit()):
        return None
    return Redirection(int(words[1]) % SLOTS, Node(host or asked.host, int(port)), words[0] == "ASK")
