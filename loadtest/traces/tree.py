"""A trace as a tree: who called whom, when, for how long, and what came of it.

Traces arrive incomplete and from several clocks. A span whose parent is not there stands at the top. A span that
seems to start before its parent, on another process, is moved into it, as no effect comes before its cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loadtest.traces.store import Span
from services.mesh import attributes as names

SHOWN = {
    names.MODEL: "model",
    names.MODEL_VERSION: "version",
    names.TIER: "tier",
    names.PROVIDER: "provider",
    names.BATCH_SIZE: "batch",
    names.QUEUE_MS: "queue_ms",
    names.FEATURE_VIEWS: "views",
    names.FEATURE_ROWS: "rows",
    names.DEGRADED: "degraded",
    names.REASON: "reason",
    names.SPAN_PRIORITY: "priority",
    "upstream_cluster": "to",
    "upstream_cluster.name": "to",
    "response_flags": "flags",
}
"""Attributes worth a reader's glance, under short names."""
_SAYS_NOTHING = ("", "-", "unspecified", False)


@dataclass(slots=True)
class Node:
    """A span in its place. start_ns: moved where its clock contradicts its parent's."""

    span: Span
    start_ns: int
    children: list[Node] = field(default_factory=list)
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A node as it is printed. branch: the tree's lines before it. offset_ms: since the trace began."""

    branch: str
    service: str
    name: str
    offset_ms: float
    duration_ms: float
    status: str
    failed: bool
    attributes: str


def build(spans: Iterable[Span]) -> list[Node]:
    """The roots, by start. Every span occurs once, also where parents are missing or form a circle."""
    nodes = {span.span: Node(span, span.start_ns) for span in sorted(spans, key=lambda span: span.start_ns)}
    roots = []
    for node in nodes.values():
        parent = nodes.get(node.span.parent)
        if parent is None or _is_below(parent, node, nodes):
            roots.append(node)
        else:
            parent.children.append(node)
    for root in roots:
        _settle(root)
    return sorted(roots, key=lambda node: node.start_ns)


def lines(roots: Sequence[Node]) -> list[Line]:
    """The tree from top to bottom."""
    if not roots:
        return []
    began_ns = min(root.start_ns for root in roots)
    found: list[Line] = []
    waiting = [(root, "", "") for root in reversed(roots)]
    while waiting:
        node, branch, below = waiting.pop()
        found.append(_line(node, began_ns, branch))
        for i, child in enumerate(reversed(node.children)):
            last = i == 0
            waiting.append((child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")))
    return found


def plain(found: Sequence[Line]) -> str:
    """The lines as text in columns, for a terminal without colours and for logs."""
    heads = [f"{line.branch}{line.service}  {line.name}" for line in found]
    width = max((len(head) for head in heads), default=0)
    rows = [
        f"{head:<{width}}  {line.offset_ms:>8.2f}  {line.duration_ms:>8.2f}  {line.status:<18}  {line.attributes}"
        for head, line in zip(heads, found, strict=True)
    ]
    title = f"{'span':<{width}}  {'start ms':>8}  {'took ms':>8}  {'status':<18}  attributes"
    return "\n".join(row.rstrip() for row in [title, *rows])


def _is_below(node: Node, top: Node, nodes: dict[str, Node]) -> bool:
    """Whether `node` descends from `top`, by its parents; true for itself."""
    seen: set[str] = set()
    at: Node | None = node
    while at is not None and at.span.span not in seen:
        if at is top:
            return True
        seen.add(at.span.span)
        at = nodes.get(at.span.parent)
    return False


def _settle(top: Node) -> None:
    """Moves subtrees that start before their parent to its middle, and sorts children by start."""
    waiting = [top]
    while waiting:
        node = waiting.pop()
        for child in node.children:
            if child.start_ns < node.start_ns and _process(child) != _process(node):
                room_ns = max(0, node.span.duration_ns - child.span.duration_ns)
                _shift(child, node.start_ns + room_ns // 2 - child.start_ns)
        node.children.sort(key=lambda child: child.start_ns)
        waiting += node.children


def _shift(top: Node, by_ns: int) -> None:
    """The clock that was wrong for a span was as wrong for the rest of its process, and likely for what it called."""
    waiting = [top]
    while waiting:
        node = waiting.pop()
        node.start_ns += by_ns
        node.moved = True
        waiting += node.children


def _process(node: Node) -> tuple[str, str]:
    return node.span.service, node.span.instance


def _line(node: Node, began_ns: int, branch: str) -> Line:
    span = node.span
    return Line(
        branch=branch,
        service=span.instance or span.service,
        name=span.name,
        offset_ms=(node.start_ns - began_ns) / 1e6,
        duration_ms=span.duration_ns / 1e6,
        status=_status(span),
        failed=span.failed,
        attributes=_attributes(node),
    )


def _status(span: Span) -> str:
    status = str(span.attributes.get(names.RPC_STATUS, ""))
    if span.failed:
        return status if status not in ("", "OK") else "ERROR"
    return status or "OK"


def _attributes(node: Node) -> str:
    shown = {
        short: node.span.attributes[name]
        for name, short in SHOWN.items()
        if name in node.span.attributes and node.span.attributes[name] not in _SAYS_NOTHING
    }
    words = [f"{short}={_text(value)}" for short, value in shown.items()]
    if node.span.message:
        words.append(f'"{node.span.message}"')
    if node.moved:
        words.append("(clock adjusted)")
    return " ".join(words)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
