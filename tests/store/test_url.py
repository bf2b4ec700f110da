import pytest

from tclora.errors import ConfigError
from tclora.store.url import check_url


@pytest.mark.parametrize("url", ["file:///mnt/store", "s3://bucket/a/b", "memory://x", "s3://b"])
def test_a_place_without_secrets_is_taken(url):
    assert check_url(f"{url}/") == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://me:hunter2@bucket/a", "no credentials"),
        ("s3://bucket/a?secret_access_key=hunter2", "no credentials"),
        ("s3://bucket/a?X-Token=hunter2", "no credentials"),
        ("/mnt/store", "must be a URL"),
        ("s3://", "must be a URL"),
        ("file://host/store", "an absolute path"),
        ("file:store", "an absolute path"),
        ("file:///mnt/../etc", "climb up"),
    ],
)
def test_another_is_refused_and_a_secret_not_repeated(url, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        check_url(url, "execution.store")
    assert str(caught.value).startswith("execution.store must ")
    assert "hunter2" not in str(caught.value)
