"""What is traced, what the gateway's spans say, and that the decision always travels on."""

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def _text(attributes, key):
    return next((entry.value.string_value for entry in attributes if entry.key == key), None)


async def _traced(world, mesh, **metadata):
    router = await world.replica("router")
    await world.collect()
    await world.start(mesh, tracing=True)
    await world.predict("critical", **metadata)
    return router.seen[0]["traceparent"]


async def _spans(world, at_least=1):
    while len(world.collector.spans) < at_least:
        world.collector.arrived.clear()
        await world.collector.arrived.wait()
    return world.collector.spans


async def test_a_clients_sampled_trace_is_joined(world, mesh_text):
    sent_on = await _traced(world, mesh_text, traceparent=f"00-{TRACE}-{PARENT}-01", x_tenant="acme")
    ((span, resource),) = await _spans(world)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == span.SPAN_KIND_SERVER
    assert sent_on == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert span.name == "/tenfold.router.v1.RouterService/Predict"
    assert _text(span.attributes, "tenfold.priority") == "critical"
    assert _text(span.attributes, "tenfold.tenant") == "acme"
    assert _text(span.attributes, "upstream_cluster.name") == "router_critical"
    assert _text(resource.attributes, "service.name") == "gateway"


async def test_a_share_of_one_traces_what_brings_no_traceparent(world, mesh_text):
    sent_on = await _traced(world, mesh_text.replace("trace_sample = 0.0", "trace_sample = 1.0"))
    spans = await _spans(world)
    assert sent_on.endswith("-01")
    assert sent_on.split("-")[1] in {span.trace_id.hex() for span, _ in spans}


async def test_a_share_of_zero_traces_nothing_and_says_so_upstream(world, mesh_text):
    sent_on = await _traced(world, mesh_text)
    version, trace, span, flags = sent_on.split("-")
    assert (version, len(trace), len(span), flags) == ("00", 32, 16, "00")
    assert await world.stat("tracing.opentelemetry.spans_sent") == 0


async def test_a_client_that_wants_no_trace_gets_none(world, mesh_text):
    always = mesh_text.replace("trace_sample = 0.0", "trace_sample = 1.0")
    sent_on = await _traced(world, always, traceparent=f"00-{TRACE}-{PARENT}-00")
    assert sent_on.split("-")[1] == TRACE
    assert sent_on.endswith("-00")
    assert await world.stat("tracing.opentelemetry.spans_sent") == 0


async def test_about_the_configured_share_is_traced(world, mesh_text):
    router = await world.replica("router")
    await world.collect()
    await world.start(mesh_text.replace("trace_sample = 0.0", "trace_sample = 0.2"), tracing=True)
    await world.answers(500, concurrent=16)
    sampled = sum(seen["traceparent"].endswith("-01") for seen in router.seen)
    assert 50 < sampled < 160  # 100 expected, standard deviation 9


async def test_without_a_collector_a_traceparent_passes_untouched(world):
    router = await world.replica("router")
    await world.start()
    await world.predict(traceparent=f"00-{TRACE}-{PARENT}-01")
    assert router.seen[0]["traceparent"] == f"00-{TRACE}-{PARENT}-01"


async def test_a_lost_collector_harms_no_call(world, mesh_text):
    await world.replica("router")
    await world.start(mesh_text.replace("trace_sample = 0.0", "trace_sample = 1.0"), tracing=True)
    assert await world.answers(50) == {"router": 50}
