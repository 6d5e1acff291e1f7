"""Scripts of the store: several commands as one step, decided where the data are."""

from __future__ import annotations

from collections.abc import Sequence

from services.feature.online.valkey import CommandError, Commands, Reply, Word
from services.feature.online.valkey_table import Script

__all__ = ["Script", "run"]


async def run(
    commands: Commands, script: Script, keys: Sequence[str], words: Sequence[Word], timeout_s: float
) -> Reply:
    """The script's reply; the store is sent its text only where it does not know it yet."""
    try:
        return await commands.call("EVALSHA", script.sha, len(keys), *keys, *words, timeout_s=timeout_s)
    except CommandError as error:
        if error.code != "NOSCRIPT":
            raise
    return await commands.call("EVAL", script.text, len(keys), *keys, *words, timeout_s=timeout_s)
