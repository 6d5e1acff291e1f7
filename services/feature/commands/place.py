"""Where a mesh has its features, as whoever runs it knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """mesh: its name, which stands in every key of the online store.

    definitions: see `services.feature.define.definitions.load`; empty where the mesh names none.
    offline: the folder or URL of events. store: the URL of the running online store; empty where none runs, and then
    `why` says so.
    """

    mesh: str
    definitions: str
    offline: str
    store: str
    why: str = ""
