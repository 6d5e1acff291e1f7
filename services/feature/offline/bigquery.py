"""The same features as a script for BigQuery.

    script = bigquery_sql(ORIGIN, {"arrivals": "lake.arrivals", "departures": "lake.departures"}, spine="lake.labels")

UNTESTED: the text has never run on BigQuery. Tests parse it, and run what a translation makes of it on DuckDB.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.feature.define.definition import View
from services.feature.offline.sql import BIGQUERY, Clock
from services.feature.offline.sql_script import statements


def bigquery_sql(
    view: View, tables: Mapping[str, str], spine: str = "tenfold.spine", clock: Clock = Clock.KNOWN
) -> str:
    """A script whose last statement has row_id, the view's columns as FLOAT64, and known: a row per row of the spine.

    UNTESTED on BigQuery itself, see above.

    tables: by the name of their source, "dataset.table" or "project.dataset.table".
    spine: such a table too, with row_id INT64, unique; entity_id STRING, null for none; as_of_us INT64, microseconds
    since 1970 UTC. Raises ScriptError.
    """
    return ";\n\n".join(statements(view, tables, spine, "CREATE TEMP TABLE", BIGQUERY, clock)) + ";\n"
