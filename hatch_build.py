"""Turns the contracts in protos/ into typed Python whenever the project is built or installed."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


class ProtoBuildHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        import google.rpc
        import grpc_tools
        from grpc_tools import protoc

        root = Path(self.root, "protos")
        # protoc.main does not search the well-known types that grpcio-tools carries
        known = [
            Path(grpc_tools.__file__).parent / "_proto",
            Path(next(iter(google.rpc.__path__))).parents[1],
        ]
        for pattern in GENERATED:  # a renamed .proto must not leave a ghost behind
            for stale in root.rglob(pattern):
                stale.unlink()
        outputs = [f"--{kind}_out={root}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
        sources = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
        includes = [f"-I{path}" for path in (root, *known)]
        if protoc.main(["protoc", *includes, *outputs, *sources]) != 0:
            raise RuntimeError("protoc failed; see the messages above")
        build_data["artifacts"].extend(GENERATED)
