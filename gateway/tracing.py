"""Which requests are traced, and what the gateway's spans say."""

from __future__ import annotations

from gateway.addresses import Config
from gateway.clusters import OTLP
from services.mesh import attributes

SERVICE_NAME = "gateway"

# spans leave soon after their end, so that a trace can be read while one still wonders
RUNTIME: Config = {"tracing.opentelemetry.flush_interval_ms": 200, "tracing.opentelemetry.min_flush_spans": 256}

_TYPE = "type.googleapis.com/"
_SAMPLERS = "envoy.extensions.tracers.opentelemetry.samplers.v3"


def tracing(share: float) -> Config:
    """Follows a client's traceparent; without one, keeps `share` (0 to 1) of the traces.

    The decision always travels on: an unsampled request carries a traceparent with flags 00.
    """
    return {
        # One span for each request, with the cluster and address that answered. A second one for each try would be
        # made and thrown away for unsampled requests too, and cost them a fifth of what the gateway costs.
        "spawn_upstream_span": False,
        "operation": "%REQ(:path)%",
        "custom_tags": [
            {"tag": attributes.SPAN_PRIORITY, "request_header": {"name": attributes.PRIORITY}},
            {"tag": attributes.SPAN_TENANT, "request_header": {"name": attributes.TENANT}},
        ],
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": {
                "@type": f"{_TYPE}envoy.config.trace.v3.OpenTelemetryConfig",
                "service_name": SERVICE_NAME,
                "grpc_service": {"envoy_grpc": {"cluster_name": OTLP}, "timeout": "1s"},
                "sampler": _sampler(share),
            },
        },
    }


def _sampler(share: float) -> Config:
    ratio: Config = {
        "@type": f"{_TYPE}{_SAMPLERS}.TraceIdRatioBasedSamplerConfig",
        "sampling_percentage": {"numerator": round(share * 1_000_000), "denominator": "MILLION"},
    }
    wrapped = {"name": "envoy.tracers.opentelemetry.samplers.trace_id_ratio_based", "typed_config": ratio}
    parent_based = {"@type": f"{_TYPE}{_SAMPLERS}.ParentBasedSamplerConfig", "wrapped_sampler": wrapped}
    return {"name": "envoy.tracers.opentelemetry.samplers.parent_based", "typed_config": parent_based}
