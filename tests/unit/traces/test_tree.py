from loadtest.traces import tree
from loadtest.traces.store import Span


def span(
    name: str, parent: str = "", start_ms: float = 0, took_ms: float = 1, service: str = "router", **attributes: object
) -> Span:
    return Span("t1", name, parent, service, f"{service}-0", name, int(start_ms * 1e6), int(took_ms * 1e6),
                attributes=attributes)  # fmt: skip


def names(nodes: list[tree.Node]) -> list[str]:
    return [node.span.name for node in nodes]


def test_children_hang_below_their_parent_in_order_of_start() -> None:
    roots = tree.build([span("late", "top", 5), span("top", took_ms=10), span("early", "top", 1)])
    assert names(roots) == ["top"]
    assert names(roots[0].children) == ["early", "late"]


def test_a_span_whose_parent_never_arrived_stands_at_the_top() -> None:
    assert names(tree.build([span("a"), span("b", "lost", 1)])) == ["a", "b"]


def test_every_span_of_a_circle_is_printed_once() -> None:
    found = tree.lines(tree.build([span("a", "c"), span("b", "a"), span("c", "b"), span("self", "self")]))
    assert sorted(line.name for line in found) == ["a", "b", "c", "self"]


def test_an_effect_that_seems_to_come_before_its_cause_is_moved_into_it_with_all_it_called() -> None:
    roots = tree.build(
        [
            span("call", start_ms=100, took_ms=10),
            span("served", "call", start_ms=40, took_ms=4, service="feature"),
            span("store", "served", start_ms=41, took_ms=1, service="feature"),
        ]
    )
    found = {line.name: line for line in tree.lines(roots)}
    assert found["served"].offset_ms == 3.0  # in the middle of what its caller waited
    assert found["store"].offset_ms == 4.0
    assert "clock adjusted" in found["served"].attributes


def test_one_process_has_one_clock_so_its_spans_are_never_moved() -> None:
    roots = tree.build([span("call", start_ms=100, took_ms=10), span("before", "call", start_ms=99)])
    assert "clock adjusted" not in tree.plain(tree.lines(roots))


def test_a_line_shows_what_matters_and_leaves_out_what_says_nothing() -> None:
    (line,) = tree.lines(
        tree.build(
            [
                span(
                    "predict",
                    **{"tenfold.tier": "full", "tenfold.degraded": False, "tenfold.reason": "", "other": 1},
                    **{"tenfold.batch.size": 3, "rpc.status_code": "OK"},
                )
            ]
        )
    )
    assert line.attributes == "tier=full batch=3"
    assert line.status == "OK"


def test_the_branches_of_the_text_show_who_called_whom() -> None:
    text = tree.plain(
        tree.lines(tree.build([span("a", took_ms=9), span("b", "a", 1), span("c", "b", 2), span("d", "a", 3)]))
    )
    assert [row.split("router-0")[0] for row in text.splitlines()[1:]] == ["", "├─ ", "│  └─ ", "└─ "]


def test_a_trace_deeper_than_the_interpreter_s_stack_is_printed() -> None:
    deep = [span(str(i), str(i - 1) if i else "") for i in range(3000)]
    assert len(tree.lines(tree.build(deep))) == 3000
