import shlex
from pathlib import Path

import pytest
from supervisor.datatypes import RestartUnconditionally
from supervisor.options import ServerOptions

from deploy.local.conf import render
from deploy.local.folders import RunFolder
from deploy.local.state import Component, Probe, StackError


def component(name: str = "router-0", stage: int = 3, command: list[str] | None = None, **environ: str) -> Component:
    return Component(name, "router", stage, command or ["true"], "unix:/x", Probe.GRPC, "unix:/x", environ)


def understood(components: list[Component], folder: Path) -> ServerOptions:
    """What supervisord itself makes of it."""
    run = RunFolder(folder / "50% of it" / "my run")
    run.make()
    run.supervisor_conf.write_text(render(components, run, folder / "control.sock"))
    options = ServerOptions()
    options.realize(["--nodaemon", "--configuration", str(run.supervisor_conf)], doc="")
    return options


def test_the_supervisor_reads_back_commands_and_variables_whatever_they_hold(tmp_path: Path) -> None:
    command = ["/a b/python", "--rate", "100%", "it's", "%(here)s"]
    wanted = component(command=command, TENFOLD_LISTEN="unix:/tmp/x.sock", TENFOLD_MODELS="/50%, of it/a=b")
    (group,) = understood([wanted], tmp_path).process_group_configs
    (process,) = group.process_configs
    assert shlex.split(process.command) == command
    assert process.environment == {"TENFOLD_LISTEN": "unix:/tmp/x.sock", "TENFOLD_MODELS": "/50%, of it/a=b"}
    assert process.stdout_logfile.endswith("50% of it/my run/logs/router-0.log")


def test_stages_become_groups_in_order_and_nothing_starts_by_itself(tmp_path: Path) -> None:
    found = understood([component("envoy-0", 4), component("a-0", 2), component("b-0", 2)], tmp_path)
    groups = sorted(found.process_group_configs)
    assert [[process.name for process in group.process_configs] for group in groups] == [["a-0", "b-0"], ["envoy-0"]]
    assert [process.autostart for group in groups for process in group.process_configs] == [False] * 3


def test_what_dies_is_always_started_again(tmp_path: Path) -> None:
    (group,) = understood([component()], tmp_path).process_group_configs
    (process,) = group.process_configs
    assert process.autorestart is RestartUnconditionally
    assert process.startretries > 100_000


@pytest.mark.parametrize("value", ["/a ;b", "/a #b", "/a\nb"])
def test_a_path_that_the_format_would_cut_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="must not contain"):
        render([component(command=[value])], RunFolder(tmp_path), tmp_path / "c.sock")


def test_a_variable_with_a_double_quote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="TENFOLD_X must not contain"):
        render([component(TENFOLD_X='a"b')], RunFolder(tmp_path), tmp_path / "c.sock")
