"What pip makes of the project, and what importing it costs"
import os, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]

def python(*argv, **env): return subprocess.run([sys.executable, *map(str, argv)], cwd=env.pop('cwd', ROOT), env={**os.environ, **env}, capture_output=True, text=True)

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    src, out = tmp_path_factory.mktemp('src'), tmp_path_factory.mktemp('wheel')
    for f in ('setup.py', 'settings.ini', 'README.md', 'LICENSE'): (src/f).write_bytes((ROOT/f).read_bytes())
    for folder in 'minibatch','nbs':
        (src/folder).mkdir()
        for f in (ROOT/folder).iterdir():
            if f.is_file(): (src/folder/f.name).write_bytes(f.read_bytes())
    p = python('-m', 'pip', 'wheel', src, '--no-deps', '--no-build-isolation', '--no-index', '-w', out)
    assert p.returncode==0, p.stderr
    return next(out.glob('*.whl'))

def test_the_wheel_holds_the_digits_and_their_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {'minibatch/digits.npz', 'minibatch/digits.md', 'minibatch/report.html', 'minibatch/py.typed', 'minibatch/__init__.py', 'minibatch/all.py'} <= set(names)
    assert any(n.endswith('LICENSE') for n in names) and not any(n.startswith(('tests', 'nbs')) for n in names)

def test_the_wheel_works_outside_the_checkout(wheel, tmp_path, bare):
    assert python('-m', 'pip', 'install', '--no-deps', '--no-index', '--target', tmp_path/'site', wheel).returncode==0
    p = python('-c', "import minibatch as mb; print(mb.__file__); print(len(mb.get_data('digits')[0]))", cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
    assert p.stdout.split()==[str(tmp_path/'site'/'minibatch'/'__init__.py'), '1500'], p.stderr
    p = python('-m', 'minibatch', 'exercises', 'mine', cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
    assert p.returncode==0 and len([*(tmp_path/'mine').glob('0[0-7]_*.ipynb')])==8, p.stderr

def test_importing_brings_in_nothing_that_is_only_needed_later():
    p = python('-c', "import torch, sys; before = set(sys.modules); import minibatch; print(*set(sys.modules)-before)")
    assert 'minibatch.datasets' in p.stdout.split()
    assert not {'matplotlib', 'pooch', 'tqdm', 'requests', 'IPython', 'minibatch.cli', 'minibatch.speed'} & {m if m.startswith('minibatch') else m.split('.')[0] for m in p.stdout.split()}

def test_every_public_name_is_in_both_places():
    import importlib, minibatch, minibatch.all
    for f in (ROOT/'minibatch').glob('[a-z]*.py'):
        if f.stem in ('all', 'check', 'cli', 'speed'): continue          # commands, and names of pieces
        for name in importlib.import_module(f'minibatch.{f.stem}').__all__:
            assert getattr(minibatch, name) is getattr(minibatch.all, name)

def test_nothing_public_hides_something_else():
    "No name is exported by two modules"
    import importlib
    names = [n for f in (ROOT/'minibatch').glob('[a-z]*.py') if f.stem not in ('all', 'check') for n in importlib.import_module(f'minibatch.{f.stem}').__all__ if n!='main']
    assert len(names)==len(set(names)), sorted(n for n in names if names.count(n)>1)

def test_constraints_fit_the_requirements():
    from packaging.requirements import Requirement
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    reqs = {}
    for r in map(Requirement, (cfg['DEFAULT']['requirements']+' '+cfg['DEFAULT']['dev_requirements']).split()): reqs.setdefault(r.name, []).append(r.specifier)
    for line in (ROOT/'constraints.txt').read_text().splitlines():
        if line.startswith('#'): continue
        r = Requirement(line)
        version = str(next(iter(r.specifier))).lstrip('=')
        assert all(s.contains(version) for s in reqs.get(r.name, [])), line
