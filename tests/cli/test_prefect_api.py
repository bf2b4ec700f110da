"""What is asked of a Prefect server by its API."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from tclora_cli import prefect_api


def test_a_busy_server_is_asked_again(monkeypatch):
    class Busy(BaseHTTPRequestHandler):
        answers = iter([503, 503, 200])

        def do_GET(self):
            self.send_response(next(self.answers))
            self.end_headers()
            self.wfile.write(b"[7]")

    monkeypatch.setattr(prefect_api, "_BUSY", (0.01, 0.01))
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert prefect_api.ask(f"http://127.0.0.1:{server.server_port}/") == [7]
        server.shutdown()
