"""Clients of teacher servers: replicas, their identity, retries."""
