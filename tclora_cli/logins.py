"""Who may use the servers of ``tclora up``: named in the environment, checked where they run.

The variables are those that the servers' clients read, so that whoever starts a server with them
set can use it as it is, and others are refused. MLflow keeps the user and the password of its first
start, Prefect reads both at every start.
"""

import base64
import importlib.metadata
import importlib.util
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from tclora.errors import ConfigError
from tclora.files import atomic_path

USER, PASSWORD = LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
SERVER, CLIENT = ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")
SHORTEST = 12  # characters of a password, MLflow's rule
RULES = """\
[mlflow]
default_permission = READ
database_uri = sqlite:///{users}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""
_NEEDED = (3, 17)  # of MLflow: takes the first user from the environment


def check_named(remembered: Mapping[str, str], folder: Path) -> None:
    """Refuse logins that are incomplete, or not those a machine was started with.

    Parameters
    ----------
    remembered : Mapping[str, str]
        What `remembered` returned when it was started.
    folder : Path
        The machine's, for messages.

    Raises
    ------
    ConfigError
        Naming the variable, never its value.
    """
    former = {USER: remembered.get("mlflow_user"), SERVER: remembered.get("prefect_login")}
    for name, value in former.items():
        if value and not os.environ.get(name):
            raise ConfigError(
                f"{name} must be set as when this machine was started, since all could use it "
                f"else; set it, or name another --folder than {folder}"
            )
    if os.environ.get(SERVER, "") != os.environ.get(CLIENT, ""):
        raise ConfigError(
            f"{CLIENT} must be what {SERVER} is, since workers and runs log in with it; set both "
            "to USER:PASSWORD, or neither"
        )
    if not mlflow_asked():
        return
    if former[USER] not in {None, os.environ[USER]}:
        raise ConfigError(
            f"{USER} must be {former[USER]!r}, the user of this machine's first start; set it, or "
            f"name another --folder than {folder}"
        )


def mlflow_asked() -> bool:
    """Return whether the environment names who may use MLflow's server.

    Raises
    ------
    ConfigError
        If it names a user without a password or the other way round, MLflow would refuse the
        password, or what it needs for logins is not installed.
    """
    missing = [name for name in LOGIN if not os.environ.get(name)]
    if len(missing) == len(LOGIN):
        return False
    if missing:
        raise ConfigError(
            f"{missing[0]} must be set, since its counterpart is; set both for a login, or neither"
        )
    if len(os.environ[PASSWORD]) < SHORTEST:
        raise ConfigError(f"{PASSWORD} must have {SHORTEST} characters or more, as MLflow wants it")
    version = importlib.metadata.version("mlflow")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < _NEEDED or importlib.util.find_spec("flask_wtf") is None:
        raise ConfigError(
            f"a login of MLflow, which {USER} asks for, needs mlflow {'.'.join(map(str, _NEEDED))} "
            f"(there is {version}) and Flask-WTF; pip install 'tclora[auth]', or unset both "
            "variables"
        )
    return True


def mlflow_settings(folder: Path) -> dict[str, str]:
    """Return the environment of MLflow's server; none where no login is asked for.

    Its users and rules are in the folder, which others may not enter from then on. The first start
    makes the user, an administrator. No file holds a password.
    """
    if not mlflow_asked():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    rules, key = folder / "mlflow-login.ini", folder / "mlflow-login.key"
    users = str(folder / "mlflow-users.db").replace("%", "%%")  # as files of this form have it
    with atomic_path(rules) as fresh:
        fresh.write_text(RULES.format(users=users), encoding="utf-8")
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


def check_servers(prefect: str, mlflow: str) -> None:
    """Ask the running servers, without and with the login: they must be as open as is wanted.

    Parameters
    ----------
    prefect, mlflow : str
        Their addresses.

    Raises
    ------
    ConfigError
        If one lets in those whom it should not, or not those whom it should.
    """
    own = ":".join(os.environ.get(name, "") for name in LOGIN)
    _check("MLflow", USER, f"{mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0", own)
    _check("Prefect", SERVER, f"{prefect}/api/admin/version", os.environ.get(CLIENT, ""))


def remembered() -> dict[str, str]:
    """Return what the next start must find named again; no secret."""
    found = {"mlflow_user": os.environ.get(USER), "prefect_login": os.environ.get(SERVER) and "yes"}
    return {name: value for name, value in found.items() if value}


def _check(server: str, name: str, url: str, login: str) -> None:
    wanted, closed = bool(os.environ.get(name)), _refuses(url)
    if wanted != closed:
        state = "with a login, which" if closed else "without the login that"
        verb = "does not name" if closed else "asks for"
        raise ConfigError(
            f"{server}'s server runs {state} {name} {verb}; start it anew by `tclora down` and "
            "`tclora up`"
        )
    if wanted and _refuses(url, login):
        raise ConfigError(
            f"{server}'s server must know the login that is set beside {name}, but refuses it; set "
            "the one it was started with first (MLflow's API changes passwords), or start it anew "
            "by `tclora down` and `tclora up` (Prefect)"
        )


def _refuses(url: str, login: str = "") -> bool:
    headers = {}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=30):  # noqa: S310
            return False
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.UNAUTHORIZED
