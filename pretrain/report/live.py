"""A server of the report of runs that are still training: a page on the loopback interface that refreshes itself."""

import html
import logging
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_prep.utils.console import UserError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
PORT = 6007
"""Default port, next to the one of TensorBoard."""
REFRESH_SECONDS = 15
"""Time after which an open page loads itself again, in seconds."""
WATCHED = ("config.yaml", "status.json", "metrics.jsonl", "evaluation/results.jsonl", "study.json")
"""Files of a run or study whose changes make the page outdated."""
Render = Callable[[], str]


class LivePage:
    """The page as it was last rendered. It is rendered again on request if a file of the runs has changed."""

    def __init__(self, paths: list[Path], render: Render):
        self._paths, self._render = paths, render
        self._lock = threading.Lock()
        self._state: dict[Path, int] | None = None
        self._page = ""

    def current(self) -> str:
        """Return the page; if the runs cannot be compared yet, a page with the reason."""
        with self._lock:
            if (state := self._file_times()) != self._state:
                began = time.monotonic()
                try:
                    self._page = self._render()
                    logger.info(f"rendered in {time.monotonic() - began:.1f} s")
                except UserError as error:
                    logger.warning(str(error))
                    self._page = _message_page(str(error))
                self._state = state
            return self._page

    def _file_times(self) -> dict[Path, int]:
        folders = [folder for path in self._paths for folder in (path, *path.iterdir()) if folder.is_dir()]
        files = [folder / name for folder in folders for name in WATCHED]
        return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def serve(paths: list[Path], render: Render, port: int) -> None:
    """Serve the page until the process is interrupted. Raises UserError if the port is not free."""
    page = LivePage(paths, render)

    class Handler(BaseHTTPRequestHandler):
        """Handler that answers requests from this machine with the page."""

        def do_GET(self) -> None:
            # a page of another site that resolves its name to 127.0.0.1 must not read the report
            if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
            else:
                body = page.current().encode()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: an open page sends a request every few seconds."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on port {port} ({error}); choose a different one with --live PORT") from None
    with server:
        logger.info(
            f"http://{HOST}:{server.server_port}/ shows the report and refreshes it every {REFRESH_SECONDS} s until "
            "Ctrl-C; reading the runs"
        )
        # before the first request, because reading the runs takes seconds
        threading.Thread(target=page.current, daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("stopped")


def _message_page(text: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{REFRESH_SECONDS}">
<title>Report</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; margin: 28px 24px; overflow-wrap: anywhere; }}
</style>
<p>{html.escape(text)}</p>
"""
