"""A client that never reads: raw HTTP/2 that gives its stream no window, so that the server's first write waits."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _header(name: str, value: str) -> bytes:
    """A literal header field without indexing, unencoded (RFC 7541, 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def _answer_pings(connection: socket.socket) -> None:
    with suppress(OSError, EOFError):
        while header := connection.recv(9, socket.MSG_WAITALL):
            payload = connection.recv(int.from_bytes(header[:3], "big"), socket.MSG_WAITALL)
            if header[3] in (PING, SETTINGS) and not header[4] & ACK:
                connection.sendall(frame(header[3], ACK, 0, payload if header[3] == PING else b""))


@contextmanager
def deaf_call(address: str, path: str, *messages: bytes, half_close: bool) -> Iterator[None]:
    """One call of the method `path` that is open meanwhile and takes nothing."""
    host, _, port = address.rpartition(":")
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    headers = b"".join(_header(*item) for item in (fields | {"content-type": "application/grpc"}).items())
    body = b"".join(b"\0" + struct.pack(">I", len(message)) + message for message in messages)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            PREFACE
            + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
            + frame(HEADERS, END_HEADERS, 1, headers)
            + frame(DATA, END_STREAM if half_close else 0, 1, body)
        )
        threading.Thread(target=_answer_pings, args=(connection,), daemon=True).start()
        yield
