"""Network tests between nodes: ports, connections, latency and bandwidth."""

import contextlib
import select
import socket
import threading
import time
from typing import Any

import psutil

CONNECT_TIMEOUT_SECONDS = 5.0
ROUND_TRIPS = 20
"""Number of round trips per latency measurement; the latency is their median."""
CHUNK_BYTES = 1 << 20
"""Bytes that are sent or received at a time when the bandwidth is measured."""

_held_listeners: dict[int, socket.socket] = {}
"""Listeners of `hold_port`, by port."""


def serve() -> int:
    """Accept connections from `measure` in the background, on a free port and all interfaces, and return the port."""
    listener = socket.create_server(("", 0), backlog=64)
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    return listener.getsockname()[1]


def hold_port(port: int) -> dict[str, Any]:
    """Listen on the port, so other nodes can try to connect.

    Returns {}, or on failure the reason and the owner of the port as `error`.
    """
    try:
        _held_listeners[port] = socket.create_server(("", port), backlog=64)
    except OSError as error:
        return {"error": f"{error.strerror}{_owner(port)}"}
    return {}


def release_port(port: int) -> None:
    """Stop listening on a port on which `hold_port` listens."""
    _held_listeners.pop(port).close()


def connect(host: str, port: int) -> dict[str, Any]:
    """Connect once. Returns {} on success, and otherwise the reason as `error`."""
    try:
        _open_connection(host, port).close()
    except OSError as error:
        return {"error": _reason(error)}
    return {}


def measure(host: str, port: int, seconds: float) -> dict[str, Any]:
    """Measure the connection to `serve` on another node.

    Returns the median round trip as `latency_seconds`, and the throughput of a stream that lasts
    `seconds` as `bytes_per_second`. If the connection fails, returns only `error`.
    """
    try:
        with _open_connection(host, port) as stream:
            stream.settimeout(CONNECT_TIMEOUT_SECONDS + seconds)
            round_trips = sorted(_echo(stream) for _ in range(ROUND_TRIPS))
            stream.sendall(b"S")
            block = bytes(CHUNK_BYTES)
            started = time.perf_counter()
            while time.perf_counter() - started < seconds:
                stream.sendall(block)
            stream.shutdown(socket.SHUT_WR)
            received = int(stream.recv(64))
            elapsed = time.perf_counter() - started
    except (OSError, ValueError) as error:
        return {"error": _reason(error)}
    return {"latency_seconds": round_trips[ROUND_TRIPS // 2], "bytes_per_second": received / elapsed}


def rounds(nodes: list[str]) -> list[list[tuple[str, str]]]:
    """Return all pairs of nodes, grouped into rounds in which no node occurs twice (circle method)."""
    circle: list[str | None] = [*nodes, *([None] * (len(nodes) % 2))]
    schedule = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        opposite = zip(circle[:half], reversed(circle[half:]), strict=True)
        schedule.append([(first, second) for first, second in opposite if first and second])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return schedule


def _open_connection(host: str, port: int) -> socket.socket:
    stream = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_SECONDS)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def _echo(stream: socket.socket) -> float:
    started = time.perf_counter()
    stream.sendall(b"E")
    if not stream.recv(1):
        raise ConnectionResetError(0, "the peer closed the connection")
    return time.perf_counter() - started


def _accept(listener: socket.socket) -> None:
    while True:
        stream, _ = listener.accept()
        threading.Thread(target=_answer, args=(stream,), daemon=True).start()


def _answer(stream: socket.socket) -> None:
    """Echo each byte E. After a byte S, count the bytes until the end of the stream, and send the count."""
    with stream, contextlib.suppress(OSError):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (command := stream.recv(1)) == b"E":
            stream.sendall(command)
        if command == b"S":
            buffer = bytearray(CHUNK_BYTES)
            received = 0
            while count := stream.recv_into(buffer):
                received += count
            stream.sendall(str(received).encode())
            select.select([stream], [], [], CONNECT_TIMEOUT_SECONDS)  # wait until the peer has read the number


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "the name cannot be resolved"
    if isinstance(error, TimeoutError):
        return "no answer (dropped by a firewall, or no route)"
    return getattr(error, "strerror", None) or str(error)


def _owner(port: int) -> str:
    """Return the name and id of the process that listens on the port as message text; empty if not accessible."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                return f": {psutil.Process(connection.pid).name()}, process {connection.pid}"
    return ""
