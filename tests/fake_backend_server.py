"""A real server process around the fake backend: `python -m tests.fake_backend_server --address 127.0.0.1:0`."""

from __future__ import annotations

import argparse
import logging

from teacher_server.server import Served, serve
from tests.fakes import FAKE_DIGEST, FakeBackend
from tests.flat_settings import teacher_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:0")
    parser.add_argument("--address-file", default="")
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--entries-per-row", type=int, default=4)
    parser.add_argument("--delay-seconds", type=float, default=0.0, help="what every batch takes")
    parser.add_argument("--seconds-per-token", type=float, default=0.0)
    parser.add_argument("--weights-digest", default=FAKE_DIGEST)
    parser.add_argument("--max-in-flight-tokens", type=int, default=65_536)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--drain-seconds", type=float, default=10.0)
    parser.add_argument("--health-address", default="")
    parser.add_argument("--metrics-port", type=int, default=-1)
    parser.add_argument("--log-level", default="WARNING")
    args = parser.parse_args()
    logging.basicConfig(level=args.log_level)
    config = teacher_config(
        model="fake",
        address=args.address,
        address_file=args.address_file,
        max_in_flight_tokens=args.max_in_flight_tokens,
        max_batch_tokens=args.max_batch_tokens,
        drain_seconds=args.drain_seconds,
        health_address=args.health_address,
        metrics_port=args.metrics_port,
    )
    serve(
        config,
        lambda: Served(
            FakeBackend(
                vocab_size=args.vocab_size,
                entries_per_row=args.entries_per_row,
                delay_seconds=args.delay_seconds,
                seconds_per_token=args.seconds_per_token,
                weights_digest=args.weights_digest,
            )
        ),
    )


if __name__ == "__main__":
    main()
