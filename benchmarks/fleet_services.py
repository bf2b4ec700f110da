"""What the drills' fleet can have beside it: a store on S3's protocol, a small disk, PostgreSQL."""

import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fleet import free_port, wait_for

_HOPS = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server of this machine, or answers each of them with 503."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = port
        self.refuses = False
        self.refused = 0

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Answer with 503 for the duration of a block."""
        self.refuses = True
        yield
        self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has gone away
            self.close_connection = True

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses:
            self.server.refused += 1
            self._answer(503, {}, b"")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in _HOPS}
        if self.command == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length") or "0"
        self._answer(answer.status, kept, content)
        upstream.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


def has_s3() -> bool:
    """Whether the packages of an S3 store and of its server are installed."""
    return all(importlib.util.find_spec(name) for name in ("s3fs", "moto", "flask"))


@contextmanager
def s3_store() -> Iterator[tuple[str, Proxy]]:
    """Start a server of S3's protocol behind a proxy, and name both in the environment.

    Yields
    ------
    str
        URL of a store in it.
    Proxy
        What stands before it.
    """
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = Proxy(port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "drill",
        "AWS_SECRET_ACCESS_KEY": "drill",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        wait_for("the S3 server", lambda: _made_bucket(port))
        yield "s3://drills/store", proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.terminate()
        server.wait()


def _made_bucket(port: int) -> bool:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        client.request("PUT", "/drills", headers={"Host": "s3.amazonaws.com"})
        return client.getresponse().status == http.client.OK
    except ConnectionError:
        return False
    finally:
        client.close()


class Postgres:
    """A PostgreSQL server of its own on the loopback, as Debian's package installs it.

    Parameters
    ----------
    folder : Path
        An empty folder that its user may enter.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._data = folder / "data"
        self._log = folder / "log"
        # It refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        self._call("initdb", "--auth=trust", "--username=tclora", "--pgdata", str(self._data))

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = f"-h 127.0.0.1 -p {self.port} -k {self._data}"
        log = str(self._log)
        self._call("pg_ctl", "start", "-w", "-D", str(self._data), "-o", options, "-l", log)

    def stop(self, how: str = "fast") -> None:
        """Stop it; "immediate" is as if it were killed."""
        self._call("pg_ctl", "stop", "-w", "-D", str(self._data), "-m", how)

    def create(self, name: str) -> None:
        """Make a database."""
        address = ("--host=127.0.0.1", f"--port={self.port}", "--username=tclora")
        self._call("createdb", *address, name)

    def _call(self, program: str, *arguments: str) -> None:
        # The server keeps standard output open for as long as it runs.
        done = subprocess.run(
            [_program(program), *arguments],
            user=self._user,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program} must succeed, but ended with code {done.returncode}")


def has_postgres() -> bool:
    """Whether PostgreSQL and the packages that Prefect and MLflow reach it by are installed."""
    packages = all(importlib.util.find_spec(name) for name in ("asyncpg", "psycopg"))
    return packages and bool(_program("initdb"))


def _program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs; Debian has some outside of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return shutil.which(name) or next(map(str, places), "")


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Start PostgreSQL, and let Prefect and MLflow of this environment keep their state in it."""
    folder = Path(tempfile.mkdtemp(prefix="tclora-postgres-"))
    names = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "MLFLOW_BACKEND_STORE_URI")
    server = Postgres(folder)
    server.start()
    try:
        address = f"tclora@127.0.0.1:{server.port}"
        server.create("prefect")
        server.create("mlflow")
        urls = (f"postgresql+asyncpg://{address}/prefect", f"postgresql+psycopg://{address}/mlflow")
        os.environ |= dict(zip(names, urls, strict=True))
        yield server
    finally:
        for name in names:
            os.environ.pop(name, None)
        server.stop()
        shutil.rmtree(folder)


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """Mount a disk of 64 MB in memory at a folder for the duration of a block."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=64m", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["/bin/umount", place], check=True)
