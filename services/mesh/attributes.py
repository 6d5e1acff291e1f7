"""Every name that spans, metrics and metadata use, so that dashboards, tests and reports share one vocabulary.

RPC names follow OpenTelemetry's semantic conventions.
"""

from typing import Final

# metadata on every hop
PRIORITY: Final = "x-priority"
TENANT: Final = "x-tenant"
COHORT: Final = "x-cohort"
TRACEPARENT: Final = "traceparent"
DEGRADED_REASON: Final = "x-degraded-reason"  # router -> fallback, and back to the client as a trailer
SHED_REASON: Final = "x-shed-reason"
PUSHBACK_MS: Final = "grpc-retry-pushback-ms"

# spans
RPC_SYSTEM: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_STATUS: Final = "rpc.status_code"
INSTANCE: Final = "service.instance.id"
SPAN_PRIORITY: Final = "tenfold.priority"
SPAN_TENANT: Final = "tenfold.tenant"
MODEL: Final = "tenfold.model"
MODEL_VERSION: Final = "tenfold.model.version"
TIER: Final = "tenfold.tier"
PROVIDER: Final = "tenfold.provider"
BATCH_SIZE: Final = "tenfold.batch.size"
QUEUE_MS: Final = "tenfold.queue_ms"
DEGRADED: Final = "tenfold.degraded"
REASON: Final = "tenfold.reason"
FEATURE_VIEWS: Final = "tenfold.feature.views"
FEATURE_ROWS: Final = "tenfold.feature.rows"
