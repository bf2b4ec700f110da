"""How MLflow's server is started: on the loopback, for one user, without what no run needs."""

import sys

# Its queues for judges in the background: seven processes, 1.8 GB, a tenth of a core while idle.
SETTINGS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def command(port: int) -> list[str]:
    """Return the command of a server on a port of 127.0.0.1."""
    server = ["mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    return [sys.executable, "-m", *server, "--port", str(port)]
