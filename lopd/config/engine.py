"""Knobs of the SGLang servers, and of the weights that are sent to them between steps."""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

from pydantic import Field, model_validator

from lopd.config.base import SPEED_ONLY, Contradiction, Section

_LAST_PORT = 65535


class SGLangSection(Section):
    """The table [sglang]: the servers of teacher and student (docs/sglang.md)."""

    # The model inside a server, and how many servers there are. The number format and the sharding
    # decide a result in its last bits; copies of the model do not.

    # The teacher's scores and the rollouts' log-probabilities are computed in it.
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16",
        description="The number format of the served weights.",
    )

    tensor: int = Field(
        default=1,
        ge=1,
        description="The tensor-parallel size of a server.",
    )

    expert: int = Field(
        default=1,
        ge=1,
        description="The expert-parallel size of a server.",
    )

    data: int = Field(
        default=1,
        ge=1,
        description="SGLang's own data-parallel size: the copies of the model inside a server.",
        json_schema_extra=SPEED_ONLY,
    )

    # Each replica is a server of its own, on its own GPUs.
    replicas: int = Field(
        default=1,
        ge=1,
        description="The number of servers of a model. The requests are spread over them.",
        json_schema_extra=SPEED_ONLY,
    )

    # Size of requests, and how many run at once.

    # It bounds the KV cache of one request.
    context_length: int = Field(
        default=4096,
        ge=8,
        description="The most tokens of a prompt and its response together.",
    )

    max_running_requests: int = Field(
        default=64,
        ge=1,
        description="The number of requests that a server decodes at once.",
        json_schema_extra=SPEED_ONLY,
    )

    # More than a server decodes at once, so that it never waits for the next request.
    max_in_flight: int = Field(
        default=128,
        ge=1,
        description="The number of requests that the client keeps open at once with each server.",
        json_schema_extra=SPEED_ONLY,
    )

    # The rest is for activations, and for what other programs hold on the device.
    mem_fraction: float = Field(
        default=0.8,
        gt=0,
        lt=1,
        description="The share of the device memory for weights and KV cache.",
        json_schema_extra=SPEED_ONLY,
    )

    max_total_tokens: int | None = Field(
        default=None,
        ge=64,
        description="The size of the KV cache in tokens. If absent, mem_fraction decides.",
        json_schema_extra=SPEED_ONLY,
    )

    # A killed stage then makes the missing responses as they would have been.
    deterministic: bool = Field(
        default=True,
        description=(
            "A request's seed decides its response, whatever else the server does. On a GPU "
            "sampling then takes about twice as long, so the recipes set false (docs/sglang.md)."
        ),
    )

    # Where servers listen. Anyone who reaches the port can use the model, hence loopback.

    host: str = Field(
        default="127.0.0.1",
        description=(
            "The address on which servers listen. The default admits only programs of the same "
            "machine."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    port: int | None = Field(
        default=None,
        ge=1,
        le=_LAST_PORT,
        description=(
            "The port of the first server. Every further server has the next port. "
            "If absent, free ports are used."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # Limits of time, and what happens after a failure.

    # Loading a large model and capturing its CUDA graphs take minutes.
    start_timeout_s: float = Field(
        default=600,
        gt=0,
        description="The seconds in which a server must start and become healthy.",
        json_schema_extra=SPEED_ONLY,
    )

    request_timeout_s: float = Field(
        default=600,
        gt=0,
        description="The seconds in which one request must be answered.",
        json_schema_extra=SPEED_ONLY,
    )

    # A repeated request has the same seed, so with deterministic its response is the same.
    retries: int = Field(
        default=3,
        ge=0,
        description=(
            "How often a failed request is sent again. The waits between grow. 0 means never."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # A server that dies at its start would die at every start.
    restarts: int = Field(
        default=2,
        ge=0,
        description=(
            "How often a dead server is started again without an answer in between. "
            "After an answer the count begins again. 0 means never."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # Longer than start_timeout_s, because the server may be starting again meanwhile.
    outage_timeout_s: float = Field(
        default=900,
        ge=0,
        description=(
            "The seconds that a client waits for a server that cannot be reached, for example "
            "while it is started again. 0 means no wait."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # A server under load may be silent for a while, so silence alone is no reason to end it.
    hang_timeout_s: float = Field(
        default=300,
        gt=0,
        description=(
            "After this number of seconds without any answer to open requests, a server must "
            "prove that it is healthy."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # Servers that the user has started. lopd neither starts nor ends them.

    # Keys are read from a variable, because configurations are kept in files and manifests.
    teacher_urls: list[str] = Field(
        default_factory=list,
        description=(
            "The URLs of the teacher's servers, if they are running already. "
            "Their API key is read from the variable LOPD_SGLANG_KEY."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # By disk only: the other transports need a part of lopd inside the server.
    student_urls: list[str] = Field(
        default_factory=list,
        description=(
            "The URLs of running servers with a model of the student's architecture. "
            "They read new weights from disk."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # Not marked SPEED_ONLY: any of them may decide a result.
    extra_args: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Any other field of SGLang's ServerArgs. Its name, type and choices are checked."
        ),
    )

    @model_validator(mode="after")
    def _ports_exist(self) -> SGLangSection:
        # Each replica has the next port, so the last one may lie above the highest.
        if self.port is not None and self.port + self.replicas - 1 > _LAST_PORT:
            highest = _LAST_PORT - self.replicas + 1
            raise Contradiction(
                f"port = {self.port} is too large for replicas = {self.replicas}",
                limit=f"at most {highest}: each of the {self.replicas} replicas uses the next port",
                remedy="lower sglang.port, or remove it",
            )
        return self


class SyncSection(Section):
    """The table [sync]: weights from the trainer into running servers (docs/weight_sync.md)."""

    # How the weights travel.

    # Disk works everywhere, also with servers of the user, and is slow for large models.
    transport: Literal["disk", "tensor", "distributed"] = Field(
        default="disk",
        description=(
            "How weights reach a server. disk: through a folder; tensor: through memory of the "
            "same host (CUDA IPC on a GPU); distributed: by broadcast (NCCL or gloo)."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    host: str = Field(
        default="127.0.0.1",
        description=(
            "The IPv4 address of the trainer's first machine, where servers join a broadcast. "
            "auto means its address on the way to the servers. The broadcast is not encrypted."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # Larger buckets need more memory, smaller ones more calls.
    bucket_bytes: int = Field(
        default=512 * 2**20,
        ge=2**10,
        description=(
            "The bytes of weights that are gathered and sent at a time. "
            "A sync needs about as much extra memory."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # It pays only over a slow network: finding what has changed costs more than a copy on one host.
    delta: bool = Field(
        default=False,
        description=(
            "Send only the tensors that have changed since the last sync. It does not work with "
            'sync.transport = "disk".'
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # For machines whose GPUs do not hold a server and the trainer together.
    colocate: bool = Field(
        default=False,
        description=(
            "Server and trainer use the same GPUs alternately: each frees its memory while the "
            "other works (docs/weight_sync.md)."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # What happens to requests while the weights change.

    # A response that continues over a sync has tokens of two versions of the weights.
    running_requests: Literal["finish", "pause", "keep", "abort"] | None = Field(
        default=None,
        description=(
            "What happens to running requests at a sync. finish: they end on the old weights; "
            "pause: they continue, with keys and values computed again; keep: they continue with "
            "the old keys and values; abort: they are ended and sent again. "
            "If absent: finish for disk, pause for the others."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # How a sync is verified, and its limit of time.

    # Servers of the user lack the part of lopd that computes fingerprints.
    verify: Literal["tensors", "scores", "off"] | None = Field(
        default=None,
        description=(
            "What is compared after a sync. tensors: a fingerprint of every tensor; scores: the "
            "scores of a few responses; off: only the version. "
            "If absent: tensors, or scores for servers that lopd did not start."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # Each of them costs a forward pass of the trainer and of the server.
    num_probes: int = Field(
        default=4,
        ge=1,
        description='The number of responses that are scored for sync.verify = "scores".',
        json_schema_extra=SPEED_ONLY,
    )

    # So large because two engines round differently in bfloat16.
    tolerance: float = Field(
        default=0.1,
        gt=0,
        description=(
            "The largest mean difference of a response's scores, in nats per token. "
            "1e-4 suits float32."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    timeout_s: float = Field(
        default=300,
        gt=0,
        description="The seconds in which a server must answer one call of a sync.",
        json_schema_extra=SPEED_ONLY,
    )

    @model_validator(mode="after")
    def _possible(self) -> SyncSection:
        # A wrong combination would only show itself at the first sync, after hours of work.
        _require_address(self.host)
        if self.transport != "disk" and self.running_requests == "finish":
            raise Contradiction(
                'running_requests = "finish" cannot be used with transport = '
                f'"{self.transport}": new requests would meet a mixture of weight '
                "versions between two buckets",
                limit=('only with transport = "disk"'),
                remedy="set sync.running_requests to pause, keep or abort, or remove it",
            )
        if self.colocate and self.transport == "distributed":
            raise Contradiction(
                'colocate = true cannot be used with transport = "distributed": NCCL '
                "does not broadcast between two processes of one GPU",
                limit=('only with transport = "tensor" or "disk"'),
                remedy='set sync.transport = "tensor"',
            )
        if self.colocate and self.delta:
            raise Contradiction(
                "delta = true cannot be used with colocate = true: a server that has "
                "given back its memory has no weights, so every tensor must be sent",
                remedy="set sync.delta = false",
            )
        if self.transport == "disk" and self.delta:
            raise Contradiction(
                'delta = true cannot be used with transport = "disk": a folder must '
                "hold every tensor",
                limit='only with transport = "tensor" or "distributed"',
                remedy="set sync.delta = false, or set sync.transport to tensor or distributed",
            )
        return self


def _require_address(host: str) -> None:
    # The address is then found when a sync begins.
    if host == "auto":
        return
    try:
        # The servers are told this address. 0.0.0.0 ("any") would tell them nothing.
        is_address = not ipaddress.IPv4Address(host).is_unspecified
    except ValueError:
        is_address = False
    if not is_address:
        raise Contradiction(
            f'host = "{host}" is not an IPv4 address',
            limit="an IPv4 address of this machine, or auto",
            remedy='set sync.host to an address of this machine, or to "auto"',
        )
