"""How MLflow's server is started: on the loopback, without what no run needs, or with a login.

A login is asked for by the variables that MLflow's clients read, so that who starts a server with
them set can use it as it is; others are refused.
"""

import importlib.util
import os
import secrets
import sys
from pathlib import Path

from tclora.errors import ConfigError
from tclora.files import atomic_path

# Its queues for judges in the background: seven processes, 1.8 GB, a tenth of a core while idle.
SETTINGS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
USER, PASSWORD = LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_RULES = """[mlflow]
default_permission = READ
database_uri = sqlite:///{users}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


def command(port: int, *, login: bool = False) -> list[str]:
    """Return the command of a server on a port of 127.0.0.1."""
    server = ["mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    asked = ["--app-name", "basic-auth"] * login
    return [sys.executable, "-m", *server, *asked, "--port", str(port)]


def login_asked() -> bool:
    """Return whether the environment names who may use the server.

    Raises
    ------
    ConfigError
        If it names a user without a password or the other way round, or what MLflow needs for
        logins is not installed.
    """
    missing = [name for name in LOGIN if not os.environ.get(name)]
    if len(missing) == len(LOGIN):
        return False
    if missing:
        raise ConfigError(
            f"{missing[0]} must be set, since its counterpart is; set both for a login, or neither"
        )
    if importlib.util.find_spec("flask_wtf") is None:
        raise ConfigError(
            f"a login of MLflow, which {USER} asks for, needs Flask-WTF; "
            "pip install 'tclora[auth]', or unset both variables"
        )
    return True


def login_settings(folder: Path) -> dict[str, str]:
    """Return the environment of a server with a login; its users and rules are in the folder.

    The first start makes the administrator. No file holds a password.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rules, key = folder / "mlflow-login.ini", folder / "mlflow-login.key"
    with atomic_path(rules) as fresh:
        fresh.write_text(_RULES.format(users=folder / "mlflow-users.db"), encoding="utf-8")
    if not key.exists():
        with atomic_path(key) as fresh:
            fresh.touch(mode=0o600)
            fresh.write_text(secrets.token_hex(), encoding="utf-8")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(rules),
        "MLFLOW_AUTH_ADMIN_USERNAME": os.environ[USER],
        "MLFLOW_AUTH_ADMIN_PASSWORD": os.environ[PASSWORD],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": key.read_text(encoding="utf-8"),
    }
