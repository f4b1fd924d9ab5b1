"""Sockets between nodes: names, connections, latency and bandwidth."""

import contextlib
import select
import socket
import threading
import time
from typing import Any

import psutil

CONNECT_TIMEOUT_SECONDS = 5.0
ECHOES = 20
"""Round trips that the latency is the median of."""
CHUNK = 1 << 20

_held: dict[int, socket.socket] = {}


def serve() -> int:
    """Take connections of `measure` from now on, on a free port of all addresses; return the port."""
    listener = socket.create_server(("", 0), backlog=64)
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    return listener.getsockname()[1]


def hold_port(port: int) -> dict[str, Any]:
    """Listen on the port, so that others can try it; `error` says who has it already."""
    try:
        _held[port] = socket.create_server(("", port), backlog=64)
    except OSError as error:
        return {"error": f"{error.strerror}{_owner(port)}"}
    return {}


def release_port(port: int) -> None:
    """Let it go."""
    _held.pop(port).close()


def connect(host: str, port: int) -> dict[str, Any]:
    """Connect once; `error` says why that failed."""
    try:
        _connected(host, port).close()
    except OSError as error:
        return {"error": _reason(error)}
    return {}


def measure(host: str, port: int, seconds: float) -> dict[str, Any]:
    """Median round trip in `latency_seconds`, and `bytes_per_second` of a stream to `serve` there for so long; or `error`."""
    try:
        with _connected(host, port) as stream:
            stream.settimeout(CONNECT_TIMEOUT_SECONDS + seconds)
            round_trips = sorted(_echo(stream) for _ in range(ECHOES))
            stream.sendall(b"S")
            block, started = bytes(CHUNK), time.perf_counter()
            while time.perf_counter() - started < seconds:
                stream.sendall(block)
            stream.shutdown(socket.SHUT_WR)
            received = int(stream.recv(64))
            elapsed = time.perf_counter() - started
    except (OSError, ValueError) as error:
        return {"error": _reason(error)}
    return {"latency_seconds": round_trips[ECHOES // 2], "bytes_per_second": received / elapsed}


def rounds(nodes: list[str]) -> list[list[tuple[str, str]]]:
    """All pairs, in rounds in which no node stands twice (the circle method)."""
    circle: list[str | None] = [*nodes, *([None] * (len(nodes) % 2))]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        found.append(
            [(one, other) for one, other in zip(circle[:half], reversed(circle[half:]), strict=True) if one and other]
        )
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def _connected(host: str, port: int) -> socket.socket:
    stream = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_SECONDS)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def _echo(stream: socket.socket) -> float:
    started = time.perf_counter()
    stream.sendall(b"E")
    if not stream.recv(1):
        raise ConnectionResetError(0, "the other side closed the connection")
    return time.perf_counter() - started


def _accept(listener: socket.socket) -> None:
    while True:
        stream, _ = listener.accept()
        threading.Thread(target=_answer, args=(stream,), daemon=True).start()


def _answer(stream: socket.socket) -> None:
    """Send back each E; from an S on count what comes until the end, and send the count."""
    with stream, contextlib.suppress(OSError):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (order := stream.recv(1)) == b"E":
            stream.sendall(order)
        if order == b"S":
            buffer, received = bytearray(CHUNK), 0
            while count := stream.recv_into(buffer):
                received += count
            stream.sendall(str(received).encode())
            select.select([stream], [], [], CONNECT_TIMEOUT_SECONDS)  # until the other side has read it


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "the name cannot be resolved"
    if isinstance(error, TimeoutError):
        return "no answer (dropped by a firewall, or no route)"
    return getattr(error, "strerror", None) or str(error)


def _owner(port: int) -> str:
    """Which process listens there, if that can be seen."""
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
