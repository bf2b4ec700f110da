"""The temporary server: what flows are spared that run beside it."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect.settings import get_current_settings

from tclora_cli.server import TemporaryServer


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    with HTTPServer(("127.0.0.1", 0), Healthy) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/api"
        served.shutdown()


@pytest.fixture
def server():
    made = TemporaryServer()
    yield made
    made.stop()


def heartbeats():
    return get_current_settings().flows.heartbeat_frequency


@pytest.mark.parametrize("ours", [True, False])
def test_a_server_that_ends_with_the_run_gets_no_heartbeats(server, address, ours):
    before = heartbeats()
    server._url = address if ours else None  # as `start` leaves it
    with server.ready():
        assert heartbeats() == (None if ours else before)
    assert heartbeats() == before
