"""The supervisor's configuration of one stack.

A process that dies is started again at once if it had run for RUNNING_AFTER_S; one that dies earlier is tried again
after 1 s, then 2 s, 3 s and so on, and never given up: what it waits for may come back. A group of processes is a
stage: groups start one after the other (`tenfold up` waits for health in between) and stop in reverse.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from deploy.local.folders import RunFolder
from deploy.local.state import Component, StackError

RUNNING_AFTER_S = 3
NEVER_GIVE_UP = 1_000_000
_LOG_BYTES, _LOG_BACKUPS = 5_000_000, 2
_COMMENT = re.compile(r"\s[;#]|[\r\n]")


def group_of(component: Component) -> str:
    return f"stage-{component.stage}"


def render(components: Iterable[Component], run: RunFolder, control: Path) -> str:
    """supervisord.conf. control: the Unix socket that it is driven by.

    Raises StackError for a path or variable that the format cannot carry.
    """
    components = list(components)
    sections = [
        _section(
            "supervisord",
            {
                "logfile": _text(run.supervisor_log),
                "logfile_maxbytes": _LOG_BYTES,
                "logfile_backups": _LOG_BACKUPS,
                "loglevel": "info",
                "pidfile": _text(control.with_suffix(".pid")),
                "directory": _text(run.path),
                "nodaemon": "true",
                "minfds": 1024,
                **({"user": "root"} if os.getuid() == 0 else {}),  # or it warns of what was chosen
            },
        ),
        _section("unix_http_server", {"file": _text(control), "chmod": "0700"}),
        _interface("supervisor", "supervisor.rpcinterface:make_main_rpcinterface"),
        _interface("tenfold", "deploy.local.supervise:spawns"),
    ]
    stages: dict[str, list[Component]] = {}
    for component in components:
        stages.setdefault(group_of(component), []).append(component)
    for group, members in stages.items():
        names = ",".join(member.name for member in members)
        sections.append(_section(f"group:{group}", {"programs": names, "priority": members[0].stage}))
    sections += [_program(component, run) for component in components]
    return "\n".join(sections)


def common_environ() -> dict[str, str]:
    """What every process of the stack gets on top of the caller's environment."""
    return {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",  # the mesh scales by processes; a pool of threads in each would only fight
        "GRPC_VERBOSITY": "ERROR",
        "MALLOC_ARENA_MAX": "2",  # glibc would keep up to eight arenas for each core
    }


def python(module: str) -> list[str]:
    """-P: a folder named services in the caller's directory must not stand in for ours."""
    return [sys.executable, "-P", "-m", module]


def _program(component: Component, run: RunFolder) -> str:
    return _section(
        f"program:{component.name}",
        {
            "command": _text(shlex.join(component.command)),
            "environment": _environment(component.environ),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": RUNNING_AFTER_S,
            "startretries": NEVER_GIVE_UP,
            "stopsignal": "TERM",
            "stopwaitsecs": max(1, round(component.stop_within_s)),
            "redirect_stderr": "true",
            "stdout_logfile": _text(_text(run.log_of(component.name))),  # this one is read twice
            "stdout_logfile_maxbytes": _LOG_BYTES,
            "stdout_logfile_backups": _LOG_BACKUPS,
        },
    )


def _interface(name: str, factory: str) -> str:
    return _section(f"rpcinterface:{name}", {"supervisor.rpcinterface_factory": factory})


def _section(name: str, entries: Mapping[str, object]) -> str:
    return "\n".join([f"[{name}]", *(f"{key} = {value}" for key, value in entries.items()), ""])


def _environment(environ: Mapping[str, str]) -> str:
    return ",".join(f"{key}={_quoted(key, value)}" for key, value in sorted(environ.items()))


def _quoted(key: str, value: str) -> str:
    if '"' in value:
        raise StackError(f'{key} must not contain ", got {value!r}')
    return f'"{_text(value)}"'


def _text(value: str | Path) -> str:
    """As the format wants it: % doubled. A comment sign after a space would cut the line, whatever the quotes."""
    text = str(value)
    if found := _COMMENT.search(text):
        raise StackError(f"a path of the stack must not contain {found[0]!r}, got {text!r}")
    return text.replace("%", "%%")
