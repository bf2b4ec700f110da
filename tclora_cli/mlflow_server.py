"""How MLflow's server is started: on the loopback, without what no run needs, or with a login."""

import sys

# Its queues for judges in the background: seven processes, 1.8 GB, a tenth of a core while idle.
SETTINGS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def command(port: int, *, login: bool = False) -> list[str]:
    """Return the command of a server on a port of 127.0.0.1."""
    server = ["mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    asked = ["--app-name", "basic-auth"] * login
    return [sys.executable, "-m", *server, *asked, "--port", str(port)]
