"""Content key -> encoded targets on disk: Arrow shards that `datasets` opens as they are (docs/cache.md)."""

from logitstream.cache.reader import CacheReader
from logitstream.cache.remote import has_manifest
from logitstream.cache.shard import Record
from logitstream.cache.writer import CacheWriter

__all__ = ["CacheReader", "CacheWriter", "Record", "has_manifest"]
