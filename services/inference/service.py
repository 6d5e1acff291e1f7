"""Open Inference Protocol (KServe v2) in, Open Inference Protocol out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib import metadata
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from services.inference.repository import Model, Repository
from services.inference.runner import Share, Total
from services.inference.tensors import Inputs, TensorSpec, stream_answer
from services.mesh import attributes
from services.mesh.context import caller_of, is_sampled
from services.mesh.errors import ending_of
from services.mesh.serve import Offer, unary, unreadable
from services.mesh.telemetry import NO_TRACING, Tracing
from services.resilience.call import Call, Caller, Priority
from services.resilience.errors import CallError, NotFound
from tenfold.inference.v2 import inference_pb2 as pb

NAME = "inference.GRPCInferenceService"
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
EXTENSIONS = ("model_configuration", "statistics")
ENCODED = ("ModelInfer", "ModelStreamInfer")  # their answers are bytes already
_PRIORITIES = {1: Priority.CRITICAL, 2: Priority.STANDARD}


class InferenceService:
    """Answers for the models of a repository. A method of the protocol that is not here answers UNIMPLEMENTED."""

    def __init__(self, repository: Repository, tracing: Tracing = NO_TRACING) -> None:
        self._repository, self.tracing = repository, tracing

    @unary(f"{NAME}/ServerLive")
    async def ServerLive(self, _: Call[pb.ServerLiveRequest]) -> pb.ServerLiveResponse:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    @unary(f"{NAME}/ServerReady")
    async def ServerReady(self, _: Call[pb.ServerReadyRequest]) -> pb.ServerReadyResponse:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._repository.ready)

    @unary(f"{NAME}/ModelReady")
    async def ModelReady(self, call: Call[pb.ModelReadyRequest]) -> pb.ModelReadyResponse:  # noqa: N802
        """An unknown model is one that is not ready."""
        try:
            self._repository.find(call.request.name, call.request.version)
        except CallError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    @unary(f"{NAME}/ServerMetadata")
    async def ServerMetadata(self, _: Call[pb.ServerMetadataRequest]) -> pb.ServerMetadataResponse:  # noqa: N802
        return pb.ServerMetadataResponse(name="tenfold", version=metadata.version("tenfold"), extensions=EXTENSIONS)

    @unary(f"{NAME}/ModelMetadata")
    async def ModelMetadata(self, call: Call[pb.ModelMetadataRequest]) -> pb.ModelMetadataResponse:  # noqa: N802
        model = self._repository.find(call.request.name, call.request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[model.version],
            platform=PLATFORM,
            inputs=[tensor(name=s.name, datatype=s.datatype.name, shape=s.shape) for s in model.signature.inputs],
            outputs=[tensor(name=s.name, datatype=s.datatype.name, shape=s.shape) for s in model.signature.outputs],
        )

    @unary(f"{NAME}/ModelConfig")
    async def ModelConfig(self, call: Call[pb.ModelConfigRequest]) -> pb.ModelConfigResponse:  # noqa: N802
        model = self._repository.find(call.request.name, call.request.version)
        return pb.ModelConfigResponse(config=_config(model))

    @unary(f"{NAME}/ModelStatistics")
    async def ModelStatistics(self, call: Call[pb.ModelStatisticsRequest]) -> pb.ModelStatisticsResponse:  # noqa: N802
        name, version = call.request.name, call.request.version
        models = [self._repository.find(name, version)] if name else self._repository.models()
        return pb.ModelStatisticsResponse(model_stats=[_statistics(model) for model in models])

    @unary(f"{NAME}/RepositoryIndex")
    async def RepositoryIndex(self, call: Call[pb.RepositoryIndexRequest]) -> pb.RepositoryIndexResponse:  # noqa: N802
        if call.request.repository_name:
            raise NotFound(f"no repository {call.request.repository_name!r}; the only one has no name")
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=entry.name,
                    version=entry.version,
                    state="READY" if entry.ready else "UNAVAILABLE",
                    reason=entry.reason,
                )
                for entry in self._repository.index()
                if entry.ready or not call.request.ready
            ]
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> bytes:  # noqa: N802
        """A serialized ModelInferResponse: see `offer`."""
        if request.parameters:
            _drop_what_the_gateway_decided(request, context)
        return await self._infer(request, context)

    @unary(f"{NAME}/ModelInfer")
    async def _infer(self, call: Call[pb.ModelInferRequest]) -> bytes:
        return await self._answer(call.request, call.caller)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[bytes]:
        """Answers in order; one that fails ends with its message, and the stream goes on."""
        try:
            async for request in requests:
                yield await self._stream_answer(request, context)
        except DecodeError as error:
            ending = ending_of(unreadable(error))
            await context.abort(ending.code, ending.message, ending.trailers)

    async def _stream_answer(self, request: pb.ModelInferRequest, context: Any) -> bytes:
        """A serialized ModelStreamInferResponse."""
        _drop_what_the_gateway_decided(request, context)
        try:
            return stream_answer(await self._answer(request, caller_of(context)))
        except CallError as error:
            failed = pb.ModelInferResponse(
                model_name=request.model_name, model_version=request.model_version, id=request.id
            )
            answer = pb.ModelStreamInferResponse(error_message=ending_of(error).message, infer_response=failed)
            return bytes(answer.SerializeToString())

    async def _answer(self, request: pb.ModelInferRequest, caller: Caller) -> bytes:
        model = self._repository.find(request.model_name, request.model_version)
        if request.parameters:
            caller = _with_parameters(caller, request)
        wanted = model.signature.wanted(request)
        inputs = model.signature.decode(request)
        if is_sampled(caller.traceparent):
            share = await self._traced(model, inputs, caller)
        else:
            share = await model.runner.infer(inputs, caller)
        return model.answers.encode(share.outputs, share.start, share.rows, wanted, request.id)

    async def _traced(self, model: Model, inputs: Inputs, caller: Caller) -> Share:
        with self.tracing.internal(f"run {model.name}", caller.traceparent) as span:
            span.set(attributes.MODEL, model.name)
            span.set(attributes.MODEL_VERSION, model.version)
            span.set(attributes.PROVIDER, model.backend.provider)
            share = await model.runner.infer(inputs, caller)
            span.set(attributes.BATCH_SIZE, share.batch_rows)
            span.set(attributes.QUEUE_MS, share.queued_s * 1000)
            return share


def offer(servicer: InferenceService) -> Offer:
    """How the service joins a server. ModelInfer's answers are bytes already, so nothing serialises them again."""
    return Offer(NAME, servicer, _add)


def _add(servicer: InferenceService, server: Any) -> None:
    handlers: dict[str, Any] = {}
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        handle = getattr(servicer, method.name, None)
        if handle is None:
            continue
        decode = GetMessageClass(method.input_type).FromString
        encode = None if method.name in ENCODED else GetMessageClass(method.output_type).SerializeToString
        streams = method.client_streaming
        kind = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = kind(handle, decode, encode)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    server.add_registered_method_handlers(NAME, handlers)


def _drop_what_the_gateway_decided(request: pb.ModelInferRequest, context: Any) -> None:
    """Where the gateway stamped a priority, a client's own parameter must not overrule it."""
    stamped = any(key == attributes.PRIORITY for key, _ in context.invocation_metadata() or ())
    if stamped and "priority" in request.parameters:
        del request.parameters["priority"]


def _with_parameters(caller: Caller, request: pb.ModelInferRequest) -> Caller:
    """priority: 1 is the highest, as in the protocol. timeout: microseconds that the request may wait and run."""
    parameters = request.parameters
    if "priority" in parameters and (level := _integer(parameters["priority"])):
        caller = replace(caller, priority=_PRIORITIES.get(level, Priority.BACKGROUND))
    if "timeout" in parameters and (timeout_us := _integer(parameters["timeout"])) > 0:
        caller = replace(caller, deadline=min(caller.deadline, time.monotonic() + timeout_us / 1e6))
    return caller


def _integer(parameter: pb.InferParameter) -> int:
    return parameter.uint64_param or parameter.int64_param


def _config(model: Model) -> pb.ModelConfig:
    batches = model.signature.max_batch > 0

    def dims(spec: TensorSpec) -> tuple[int, ...]:
        return spec.shape[1:] if batches else spec.shape

    on_gpu = "CPU" not in model.backend.provider
    config = pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=BACKEND,
        max_batch_size=model.signature.max_batch,
        input=[
            pb.ModelInput(name=s.name, data_type=s.datatype.config, dims=dims(s))  # type: ignore[arg-type]
            for s in model.signature.inputs
        ],
        output=[
            pb.ModelOutput(name=s.name, data_type=s.datatype.config, dims=dims(s))  # type: ignore[arg-type]
            for s in model.signature.outputs
        ],
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[int(model.version)])),
        instance_group=[
            pb.ModelInstanceGroup(
                name=model.name,
                count=1,
                kind=pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU,
            )
        ],
        default_model_filename="model.onnx",
    )
    if batches:
        config.dynamic_batching.SetInParent()
    for key, value in {**model.backend.metadata, "tenfold.provider": model.backend.provider}.items():
        config.parameters[key].string_value = value
    return config


def _statistics(model: Model) -> pb.ModelStatistics:
    kept = model.runner.statistics
    stats = pb.InferStatistics(
        success=_duration(kept.success),
        fail=_duration(kept.fail),
        queue=_duration(kept.queue),
        compute_input=_duration(kept.gather),
        compute_infer=_duration(kept.compute),
    )
    return pb.ModelStatistics(
        name=model.name,
        version=model.version,
        last_inference=int(kept.last * 1000),
        inference_count=kept.rows,
        execution_count=kept.runs,
        inference_stats=stats,
        batch_stats=[
            pb.InferBatchStatistics(batch_size=rows, compute_infer=_duration(total))
            for rows, total in sorted(kept.by_rows.items())
        ],
    )


def _duration(total: Total) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=total.count, ns=int(total.seconds * 1e9))
