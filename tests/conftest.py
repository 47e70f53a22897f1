import gc
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

# Before tqdm is imported, which reads it then: bars are drawn on stderr, where tests look for what a command says.
os.environ["TQDM_DISABLE"] = "1"

import pytest
from hypothesis import HealthCheck, settings
from transformers.utils import logging

import melayer
import toys
from melayer.errors import ModelError
from melayer.interventions import load as models

logging.set_verbosity_error()
logging.disable_progress_bar()
# No example is too slow: it says something of the machine and its other jobs.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser):
    parser.addoption(
        "--hostile", choices=["some", "all"], default="some", help="how many of the hostile cases (tests/hostile)"
    )


def pytest_collection_finish():
    """Millions of objects are imported by now, and stay: each collection of garbage would look through them all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return toys.tokenizer()


@pytest.fixture(scope="session")
def toy_directory(tmp_path_factory):
    """A Llama toy with a massive activation (block 3, dimension 7, 3000), saved with its tokenizer."""
    directory = tmp_path_factory.mktemp("toy")
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    model.save_pretrained(directory)
    toys.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def demo():
    """The demo model. Skipped where its package is missing, except in CI, which installs it."""
    try:
        return models.load("demo")
    except ModelError as error:
        if os.environ.get("CI") or "is not installed" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="session")
def _data_sets_are_not_kept(tmp_path_factory):
    """What the tests read is cached for them alone."""
    place = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(place)  # for those that import it from here on, also in other processes
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_DATASETS_CACHE = place


@pytest.fixture(autouse=True)
def _own_warnings_are_errors():
    from melayer.errors import MelayerWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", MelayerWarning)
        yield


@pytest.fixture
def room():
    """Limits the size of every file that this process writes, in bytes: what a full disk does to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if n_bytes is None else n_bytes, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.fixture
def python():
    """The interpreter and an environment in which it imports the tests' own modules and the very package under test."""
    places = [str(Path(__file__).parent), str(Path(melayer.__file__).parents[1])]
    return sys.executable, {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
