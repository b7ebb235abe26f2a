import os, signal
from pathlib import Path
import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)      # a test run in the background inherits that Ctrl-C is ignored

SHARED = Path(os.environ.get('MINIBATCH_DATA') or 'nowhere').absolute()

@pytest.fixture(scope='session')
def shared():
    "The folder with the published files, where there is one"
    if not (SHARED/'mnist').is_dir(): pytest.skip('MINIBATCH_DATA names no folder with the published MNIST and KMNIST files')
    return SHARED

@pytest.fixture
def bare(monkeypatch, tmp_path):
    "An environment without data: no `MINIBATCH_DATA`, and an empty cache folder, which is returned"
    monkeypatch.delenv('MINIBATCH_DATA', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))                # for programs that a test starts
    monkeypatch.setattr('pooch.os_cache', lambda project: tmp_path/'cache'/project)
    return tmp_path/'cache'/'minibatch'

def pytest_configure(config): config.addinivalue_line('markers', 'kills: takes minutes; only with `pytest -m kills`')

def pytest_collection_modifyitems(config, items):
    if 'kills' not in config.getoption('-m'): items[:] = [i for i in items if not i.get_closest_marker('kills')]
