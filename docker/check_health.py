"""Health check of a container: exit status 0 where the gRPC health service at one of HOST:PORT… says SERVING."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

SECONDS = 4.0
"""For all addresses together; docker/teacher.Dockerfile allows 5 with the start of Python."""


def main() -> int:
    return int(not any(is_serving(address, seconds=SECONDS / len(sys.argv[1:])) for address in sys.argv[1:]))


def is_serving(address: str, *, seconds: float) -> bool:
    with grpc.insecure_channel(address) as channel:
        try:
            status = HealthStub(channel).Check(HealthCheckRequest(), timeout=seconds).status
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}: {error.details()}", file=sys.stderr)
            return False
    print(HealthCheckResponse.ServingStatus.Name(status))
    return bool(status == HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main())
