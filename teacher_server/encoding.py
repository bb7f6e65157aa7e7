"""The encoding of a scored batch's targets, in threads beside the one that scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from logitstream import codec, metrics
from logitstream.errors import InvalidSpec, RequestError, ScoringFailed
from logitstream.id_model import IdModel
from logitstream.types import SparseTargets, TargetSpec
from teacher_server.backend import EncodedTargets, ScoreResult

Encode = Callable[[SparseTargets, TargetSpec], bytes]

log = logging.getLogger(__name__)


def encoder(id_model: bytes, max_bytes: int) -> Encode:
    """Return a function that encodes targets in the spec's version and refuses those larger than a message."""
    model = IdModel.from_bytes(id_model) if id_model else None

    def encode(targets: SparseTargets, spec: TargetSpec) -> bytes:
        payload = codec.encode(targets, version=spec.codec_version, id_model=model)
        if len(payload) > max_bytes:
            raise InvalidSpec(
                f"targets of {len(payload)} bytes for {targets.num_rows} tokens: a message holds {max_bytes}; "
                f"ask for shorter sequences or fewer entries"
            )
        return payload

    return encode


def encode_all(
    encode: Encode, results: Sequence[ScoreResult], specs: Sequence[TargetSpec]
) -> list[bytes | RequestError]:
    """Encode a batch; targets that cannot be encoded fail alone."""
    start = time.perf_counter()
    answers = [_encoded(encode, result, spec) for result, spec in zip(results, specs, strict=True)]
    metrics.TEACHER_STAGE_SECONDS.labels("encode").observe(time.perf_counter() - start)
    return answers


def _encoded(encode: Encode, result: ScoreResult, spec: TargetSpec) -> bytes | RequestError:
    if isinstance(result, RequestError):
        return result
    metrics.TEACHER_TOKENS.inc(result.num_rows)
    metrics.TEACHER_ENTRIES.inc(result.num_entries)
    try:
        return result.payload if isinstance(result, EncodedTargets) else encode(result, spec)
    except RequestError as error:
        return error
    except Exception:
        log.exception("targets of %d rows could not be encoded", result.num_rows)
        return ScoringFailed("the teacher's targets could not be encoded")
