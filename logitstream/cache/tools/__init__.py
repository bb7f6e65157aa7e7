"""Maintenance of caches: verify, merge, prune, describe, export (the `logitstream cache` command)."""
