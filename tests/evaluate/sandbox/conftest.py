import pytest

from tclora.evaluate.sandbox.judge import SandboxError, check_isolation
from tclora.evaluate.sandbox.limits import Limits


@pytest.fixture(scope="session")
def walls():
    """Skip where the machine does not offer what a sandbox is made of, such as in a container."""
    try:
        check_isolation()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def tight():
    """Limits that hostile programs reach soon."""
    return Limits(
        seconds=3, cpu_seconds=1, memory=512 << 20, file_bytes=1 << 20, disk_bytes=4 << 20
    )
