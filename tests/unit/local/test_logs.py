from pathlib import Path

from deploy.local.logs import Tail, last_lines, readable


def test_the_last_lines_come_oldest_first(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("1\n2\n3\n")
    assert last_lines(log, 2) == ["2", "3"]
    assert last_lines(log, 0) == []
    assert last_lines(tmp_path / "none.log", 2) == []


def test_a_tail_gives_each_new_line_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\n")
    with Tail(log) as tail:
        with log.open("a") as file:
            file.write("new\nhal")
            file.flush()
            assert tail.new_lines() == ["new"]
            file.write("f\n")
        assert tail.new_lines() == ["half"]
        assert tail.new_lines() == []


def test_a_tail_follows_a_rotation_without_losing_a_line(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("")
    with Tail(log) as tail:
        with log.open("a") as file:
            file.write("last of the old\n")
        log.rename(tmp_path / "a.log.1")
        log.write_text("first of the new\n")
        assert tail.new_lines() == ["last of the old", "first of the new"]


def test_a_tail_waits_for_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with Tail(log) as tail:
        assert tail.new_lines() == []
        log.write_text("first\n")
        assert tail.new_lines() == ["first"]


def test_an_event_is_told_in_one_line_with_its_fields() -> None:
    line = (
        '{"at": "2026-01-02T03:04:05.678+00:00", "level": "info", "instance": "router-0", "logger": "x",'
        ' "event": "serving", "listen": "unix:/x"}'
    )
    assert readable(line) == "03:04:05.678 info    serving  listen=unix:/x"


def test_what_is_no_event_stays_as_it_is() -> None:
    for line in ("plain", "{", "[1]", "null", '{"event": "half"}'):
        assert readable(line) == line
