"""Health check of a container: exit status 0 where the gRPC health service at HOST:PORT says SERVING."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub


def main() -> int:
    with grpc.insecure_channel(sys.argv[1]) as channel:
        try:
            status = HealthStub(channel).Check(HealthCheckRequest(), timeout=4).status
        except grpc.RpcError as error:
            print(f"{sys.argv[1]}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    print(HealthCheckResponse.ServingStatus.Name(status))
    return int(status != HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main())
