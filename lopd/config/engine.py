"""Knobs of the SGLang servers and of the weights that go into them between steps."""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

from pydantic import Field, model_validator

from lopd.config.base import SPEED_ONLY, Contradiction, Section

_LAST_PORT = 65535


class SGLangSection(Section):
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Number format of the served weights."
    )
    tensor: int = Field(default=1, ge=1, description="Tensor-parallel size of a server.")
    expert: int = Field(default=1, ge=1, description="Expert-parallel size of a server.")
    data: int = Field(
        default=1,
        ge=1,
        description="SGLang's own data-parallel size: copies of the model inside a server.",
        json_schema_extra=SPEED_ONLY,
    )
    replicas: int = Field(
        default=1,
        ge=1,
        description="Servers of a model; requests are spread over them.",
        json_schema_extra=SPEED_ONLY,
    )
    context_length: int = Field(
        default=4096, ge=8, description="Prompt and response together, in tokens."
    )
    max_running_requests: int = Field(
        default=64,
        ge=1,
        description="Requests a server decodes at once.",
        json_schema_extra=SPEED_ONLY,
    )
    max_in_flight: int = Field(
        default=128,
        ge=1,
        description="Requests the client keeps open at once with each server.",
        json_schema_extra=SPEED_ONLY,
    )
    mem_fraction: float = Field(
        default=0.8,
        gt=0,
        lt=1,
        description="Share of device memory for weights and KV cache.",
        json_schema_extra=SPEED_ONLY,
    )
    max_total_tokens: int | None = Field(
        default=None,
        ge=64,
        description="KV cache size in tokens; absent: from mem_fraction.",
        json_schema_extra=SPEED_ONLY,
    )
    deterministic: bool = Field(
        default=True,
        description="A request's seed fixes its response. On a GPU sampling takes about twice as long (docs/sglang.md): the recipes set false.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address that servers listen on; wider than loopback only where asked.",
        json_schema_extra=SPEED_ONLY,
    )
    port: int | None = Field(
        default=None,
        ge=1,
        le=_LAST_PORT,
        description="Port of the first server, the next has the next; absent: free ones.",
        json_schema_extra=SPEED_ONLY,
    )
    start_timeout_s: float = Field(
        default=600,
        gt=0,
        description="Seconds a server may take to become healthy.",
        json_schema_extra=SPEED_ONLY,
    )
    request_timeout_s: float = Field(
        default=600, gt=0, description="Seconds one request may take.", json_schema_extra=SPEED_ONLY
    )
    retries: int = Field(
        default=3,
        ge=0,
        description="Repeats of a failed request, with backoff.",
        json_schema_extra=SPEED_ONLY,
    )
    restarts: int = Field(
        default=2,
        ge=0,
        description="Restarts in a row of a server that dies without having answered anything between.",
        json_schema_extra=SPEED_ONLY,
    )
    outage_timeout_s: float = Field(
        default=900,
        ge=0,
        description="Seconds a client waits for a server that cannot be reached, as while it is restarted.",
        json_schema_extra=SPEED_ONLY,
    )
    hang_timeout_s: float = Field(
        default=300,
        gt=0,
        description="Seconds without any answer to open requests after which a server must prove its health.",
        json_schema_extra=SPEED_ONLY,
    )
    teacher_urls: list[str] = Field(
        default_factory=list,
        description="Servers of the teacher that run already; their key in LOPD_SGLANG_KEY.",
        json_schema_extra=SPEED_ONLY,
    )
    student_urls: list[str] = Field(
        default_factory=list,
        description="Servers of the student's architecture that run already; weights go in by disk.",
        json_schema_extra=SPEED_ONLY,
    )
    extra_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other SGLang ServerArgs field, checked by name, type and choice.",
    )

    @model_validator(mode="after")
    def _ports_exist(self) -> SGLangSection:
        if self.port is not None and self.port + self.replicas - 1 > _LAST_PORT:
            limit = f"{_LAST_PORT - self.replicas + 1}: each of {self.replicas} replicas has the next one"
            raise Contradiction(
                f"port = {self.port} with replicas = {self.replicas}",
                limit=limit,
                remedy="lower sglang.port, or leave it out",
            )
        return self


class SyncSection(Section):
    """Weights from the trainer into running servers (sglang_rollout/weight_sync,
    docs/weight_sync.md).
    """

    transport: Literal["disk", "tensor", "distributed"] = Field(
        default="disk",
        description="disk: a folder; tensor: memory shared on the host (CUDA IPC on a GPU); distributed: broadcast (NCCL, gloo).",
        json_schema_extra=SPEED_ONLY,
    )
    host: str = Field(
        default="127.0.0.1",
        description="Where servers join a broadcast: an IPv4 address of the trainer's first machine; auto: the one towards them. Unencrypted.",
        json_schema_extra=SPEED_ONLY,
    )
    bucket_bytes: int = Field(
        default=512 * 2**20,
        ge=2**10,
        description="Weights that are gathered and sent at a time: bounds the extra memory.",
        json_schema_extra=SPEED_ONLY,
    )
    running_requests: Literal["finish", "pause", "keep", "abort"] | None = Field(
        default=None,
        description="finish: end on the old weights; pause: go on, all read again; keep: go on with old keys and values; abort. Absent: finish (disk), pause.",
        json_schema_extra=SPEED_ONLY,
    )
    verify: Literal["tensors", "scores", "off"] | None = Field(
        default=None,
        description="After a sync compare every tensor's fingerprint, or scores of a few responses. Absent: tensors, of servers of others scores.",
        json_schema_extra=SPEED_ONLY,
    )
    num_probes: int = Field(
        default=4,
        ge=1,
        description='Responses scored for verify = "scores".',
        json_schema_extra=SPEED_ONLY,
    )
    tolerance: float = Field(
        default=0.1,
        gt=0,
        description="Mean difference of a response, nats a token; 1e-4 suits float32.",
        json_schema_extra=SPEED_ONLY,
    )
    delta: bool = Field(
        default=False,
        description="Send only tensors that have changed since the last sync (not by disk).",
        json_schema_extra=SPEED_ONLY,
    )
    timeout_s: float = Field(
        default=300,
        gt=0,
        description="Seconds a server may take for one call of a sync.",
        json_schema_extra=SPEED_ONLY,
    )
    colocate: bool = Field(
        default=False,
        description="Server and trainer take turns with the same GPUs: each gives its memory back while the other works (docs/weight_sync.md).",
        json_schema_extra=SPEED_ONLY,
    )

    @model_validator(mode="after")
    def _possible(self) -> SyncSection:
        if self.host != "auto":
            try:
                known = not ipaddress.IPv4Address(
                    self.host
                ).is_unspecified  # servers are told the address: 0.0.0.0 says nothing
            except ValueError:
                known = False
            if not known:
                limit = "an IPv4 address of this machine, or auto"
                raise Contradiction(
                    f'host = "{self.host}" is no IPv4 address',
                    limit=limit,
                    remedy='name one, or set sync.host = "auto"',
                )
        if self.transport != "disk" and self.running_requests == "finish":
            limit = f'it needs transport = "disk": by {self.transport}, new requests would meet a mixture of versions between two buckets'
            remedy = "set sync.running_requests to pause, keep or abort, or leave it out"
            raise Contradiction(
                f'running_requests = "finish" with transport = "{self.transport}"',
                limit=limit,
                remedy=remedy,
            )
        if self.colocate and self.transport == "distributed":
            limit = 'transport = "tensor" or "disk": NCCL does not broadcast between two processes of one GPU'
            raise Contradiction(
                'colocate = true with transport = "distributed"',
                limit=limit,
                remedy='set sync.transport = "tensor"',
            )
        if self.colocate and self.delta:
            limit = "a server that has given its memory back holds nothing that could be left out"
            raise Contradiction(
                "delta = true with colocate = true", limit=limit, remedy="set sync.delta = false"
            )
        if self.transport == "disk" and self.delta:
            limit = 'transport = "tensor" or "distributed": a folder must hold every tensor'
            raise Contradiction(
                'delta = true with transport = "disk"',
                limit=limit,
                remedy="set sync.delta = false, or another transport",
            )
        return self
