import pytest

from hostile import running


@pytest.fixture(scope="session")
def setting(tmp_path_factory):
    return running.Setting.made(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="session")
def everything(request):
    """Whether every case is asked for, or the selection that every run of the tests takes."""
    return request.config.getoption("--hostile") == "all"
