"""Where a store may be: an fsspec URL that carries no secret."""

from urllib.parse import parse_qs, urlsplit

from tclora.errors import ConfigError

_SECRETS = ("key", "secret", "token", "password", "signature", "credential")
_REMEDY = "leave them to the environment of the parent and of the workers"


def check_url(url: str, name: str = "store") -> str:
    """Check the URL of a store.

    Parameters
    ----------
    url : str
        Such as ``"file:///mnt/store"`` or ``"s3://bucket/prefix"``.
    name : str
        What messages call it.

    Returns
    -------
    str
        The same without a slash at its end.

    Raises
    ------
    ConfigError
        If it names no scheme and folder, holds credentials, or climbs up by ``..``.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or _names_secrets(parts.query):
        # The URL goes to parameters of runs, which anyone may read who sees the server.
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        raise ConfigError(f"{name} must hold no credentials, got {shown!r} with some; {_REMEDY}")
    if not parts.scheme or not (parts.netloc + parts.path).strip("/"):
        raise ConfigError(
            f"{name} must be a URL such as 'file:///mnt/store' or 's3://bucket/prefix', got {url!r}"
        )
    if ".." in parts.path.split("/"):
        raise ConfigError(f"{name} must not climb up by '..', got {url!r}; name the folder itself")
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ConfigError(f"{name} must be 'file:' and an absolute path, got {url!r}")
    return url.rstrip("/")


def _names_secrets(query: str) -> bool:
    return any(word in name.lower() for name in parse_qs(query) for word in _SECRETS)
