"The command `minibatch`, as a user runs it"
import contextlib, csv, io, json, os, signal, subprocess, sys
from types import SimpleNamespace
import pytest, torch
from minibatch.cli import main

FILES = ['checkpoint', 'config.json', 'history.csv', 'loss.png', 'model.pt', 'predictions.png', 'report.html']
MAIN = 'from minibatch.cli import main; raise SystemExit(main())'

def process(*argv, cwd, code=MAIN):
    "Run `code` as a program of its own"
    return subprocess.run([sys.executable, '-c', code, *map(str, argv)], cwd=cwd, capture_output=True, text=True)

@pytest.fixture
def run(monkeypatch, tmp_path, bare):
    "A function that calls the command with arguments, in this process, and returns what a process would"
    monkeypatch.chdir(tmp_path)
    def run(*argv):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try: status = main([*map(str, argv)])
            except SystemExit as e: status = e.code
        return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())
    return run

def weights(folder): return torch.load(folder/'model.pt', weights_only=True)
def same(a, b): return a.keys()==b.keys() and all(a[k].equal(b[k]) for k in a)

def test_no_argument_trains_on_the_digits(tmp_path, bare):
    p = process(cwd=tmp_path)
    assert p.returncode==0 and p.stderr==''
    *_, last = p.stdout.splitlines()
    assert float(last.split()[1])>0.9 and 'minibatch-run' in last
    rows = list(csv.DictReader(open(tmp_path/'minibatch-run'/'history.csv')))
    assert [int(r['epoch']) for r in rows]==list(range(1, len(rows)+1)) and f"{float(rows[-1]['accuracy']):.4f}"==last.split()[1]
    assert len({len(l) for l in p.stdout.splitlines()[1:-1]})==1                      # the table is aligned
    assert torch.load(tmp_path/'minibatch-run'/'model.pt', weights_only=True)['0.weight'].shape==(50,784)
    assert sorted(f.name for f in (tmp_path/'minibatch-run').iterdir())==FILES
    for f in ('loss', 'predictions'): assert (tmp_path/'minibatch-run'/f'{f}.png').read_bytes().startswith(b'\x89PNG')
    config = json.loads((tmp_path/'minibatch-run'/'config.json').read_text())
    assert config==dict(dataset='digits', model='mlp', epochs=30, bs=64, lr=0.05, momentum=0.9, device='auto', workers=0, seed=42)

def test_mnist_in_three_epochs(run, shared, monkeypatch):
    monkeypatch.setenv('MINIBATCH_DATA', str(shared))
    p = run('--dataset', 'mnist', '--epochs', 3, '--out', 'here')
    assert p.returncode==0 and len(p.stdout.splitlines())==6
    assert float(p.stdout.splitlines()[-1].split()[1])>0.95

def test_every_option(tmp_path, run):
    opts = dict(dataset='digits', model='cnn', epochs=1, bs=100, lr=0.02, momentum=0.5, device='cpu', workers=2, seed=7)
    p = run(*(a for k,v in opts.items() for a in (f'--{k}', v)), '--out', 'all/of/it')
    assert p.returncode==0 and json.loads((tmp_path/'all/of/it/config.json').read_text())==opts
    assert weights(tmp_path/'all/of/it')['2.weight'].shape==(32,1,3,3)

def test_a_killed_run_resumed_is_the_whole_run(tmp_path, run):
    run('--epochs', 12, '--out', 'whole')
    code = '''if 1:
        import functools, os, signal, minibatch.training as t, minibatch.cli as c
        class Bomb(t.Callback):
            order = 300
            def after_batch(self, run):
                if (run.epoch,run.batch)==(5,11): os.kill(os.getpid(), signal.SIGKILL)
        fit,c.Checkpoint = c.fit,functools.partial(c.Checkpoint, every=7)       # whatever a checkpoint may cost here
        c.fit = lambda *args, cbs, **kw: fit(*args, cbs=[*cbs, Bomb()], **kw)
        raise SystemExit(c.main())'''
    assert process('--epochs', 12, '--out', 'cut', cwd=tmp_path, code=code).returncode==-9
    p = run('--out', 'cut')
    assert p.returncode==2 and 'not finished: --resume goes on' in p.stderr
    p = run('--resume', '--out', 'cut')
    assert p.returncode==0 and 'checkpoint: going on after 5 epochs and 7 batches' in p.stdout
    assert same(weights(tmp_path/'whole'), weights(tmp_path/'cut'))
    rows = [[{k: v for k,v in r.items() if k!='seconds'} for r in csv.DictReader(open(tmp_path/f/'history.csv'))] for f in ('whole', 'cut')]
    assert rows[0]==rows[1] and len(rows[0])==12
    longer = run('--resume', '--out', 'cut', '--epochs', 14), run('--epochs', 14, '--out', 'whole')
    assert all(p.returncode==0 for p in longer) and same(weights(tmp_path/'whole'), weights(tmp_path/'cut'))

def test_a_config_repeats_the_run(tmp_path, run):
    run('--epochs', 2, '--seed', 5, '--lr', 0.1, '--out', 'a')
    config = json.loads((tmp_path/'a'/'config.json').read_text())
    run(*(a for k,v in config.items() for a in (f'--{k}', v)), '--out', 'b')
    assert same(weights(tmp_path/'a'), weights(tmp_path/'b'))

def test_resume_needs_the_run_it_goes_on_with(tmp_path, run):
    run('--epochs', 1)
    before = {f.name: f.read_bytes() for f in (tmp_path/'minibatch-run').iterdir()}
    for argv,why in ((['--lr', 0.2], '--lr is 0.2, but the run to resume has 0.05'), (['--model', 'cnn'], 'has mlp'), (['--out', 'elsewhere'], 'elsewhere holds no run')):
        p = run('--resume', *argv)
        assert (p.returncode, p.stderr.count('\n'))==(2, 1) and why in p.stderr
    assert before=={f.name: f.read_bytes() for f in (tmp_path/'minibatch-run').iterdir()}
    good = json.loads(before['config.json'])
    for bad in (b'{"dataset": "dig', b'[]', b'{}', b'\xff\xfe{', json.dumps(dict(good, lr='0.05')).encode(), json.dumps(dict(good, foo=1)).encode(), json.dumps(dict(good, bs=64.)).encode()):
        (tmp_path/'minibatch-run'/'config.json').write_bytes(bad)
        p = run('--resume')
        assert (p.returncode, p.stderr.count('\n'))==(2, 1) and 'config.json is not what a run leaves there' in p.stderr

def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, run):
    run('--epochs', 3)
    f = tmp_path/'minibatch-run'/'checkpoint'
    want,data = weights(f.parent),bytearray(f.read_bytes())
    data[len(data)//2] ^= 1
    f.write_bytes(data)
    p = run('--resume')
    assert p.returncode==1 and p.stderr.count('\n')==1 and p.stderr.startswith('minibatch: ') and 'damaged' in p.stderr and 'remove it' in p.stderr
    f.write_bytes(b'what the first version wrote')
    p = run('--resume')
    assert p.returncode==1 and p.stderr.count('\n')==1 and 'older version' in p.stderr
    f.unlink()
    p = run('--resume')
    assert p.returncode==0 and 'was ended before its first checkpoint: beginning anew' in p.stdout and same(want, weights(f.parent))

def test_a_new_run_leaves_nothing_of_the_old_one(tmp_path, run):
    run('--epochs', 1)
    assert run('--lr', '1e30').returncode==1
    assert sorted(os.listdir(tmp_path/'minibatch-run'))==['config.json']
    (tmp_path/'file').write_text('')
    p = run('--out', 'file')
    assert p.returncode==2 and '--out file is a file' in p.stderr

def test_ctrl_c_is_status_130_and_can_be_resumed(tmp_path, run):
    code = 'import functools, minibatch.cli as c; c.Checkpoint = functools.partial(c.Checkpoint, every=7); raise SystemExit(c.main())'
    p = subprocess.Popen([sys.executable, '-c', code, '--epochs', '100000'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if line.split()[0]=='3': break
    p.send_signal(signal.SIGINT)
    _, err = p.communicate()
    assert p.returncode==130 and '--resume --out minibatch-run goes on' in err and err.count('\n')==1
    config = (tmp_path/'minibatch-run'/'config.json').read_text()
    for argv,why in (([], 'not finished: --resume goes on'), (['--resume', '--epochs', 1], '--epochs is 1, but ')):
        p = run(*argv)
        assert (p.returncode, p.stderr.count('\n'))==(2, 1) and why in p.stderr
    assert (tmp_path/'minibatch-run'/'config.json').read_text()==config
    p = run('--resume', '--epochs', 10**5+1, '--lr', 1)
    assert p.returncode==2 and 'has 0.05' in p.stderr

def test_python_m_minibatch(tmp_path, bare):
    p = subprocess.run([sys.executable, '-m', 'minibatch', '--epochs', '1'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode==0 and sorted(f.name for f in (tmp_path/'minibatch-run').iterdir())==FILES
    p = subprocess.run([sys.executable, '-m', 'minibatch', '--epochs', '0'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode==2 and p.stderr.startswith('minibatch: --epochs is 0')

def test_the_same_seed_gives_the_same_run(tmp_path, run):
    losses = [[r.split()[1] for r in run('--seed', s, '--epochs', 2).stdout.splitlines()[2:4]] for s in (1,1,2)]
    assert losses[0]==losses[1]!=losses[2]

@pytest.mark.parametrize('argv', [['--dataset', 'minst'], ['--epochs', 'many'], ['--epochs', '0'], ['--epochs', '-1'], ['--bs', '0'], ['--bs', '1.5'], ['--bs', str(10**30)], ['--lr', '0'],
                                  ['--lr', 'nan'], ['--lr', 'inf'], ['--lr', '1e+300'], ['--device', 'meta'], ['--model', 'rnn'], ['--momentum', '1'], ['--momentum', '-0.5'], ['--device', 'warp'], ['--device', 'cuda:99'],
                                  ['--workers', '-1'], ['--workers', '1000000'], ['--seed', '-1'], ['--frobnicate'], ['surplus'], ['--lr']])
def test_bad_use_is_one_line_and_status_2(tmp_path, run, argv):
    p = run(*argv)
    assert (p.returncode, p.stdout, p.stderr.count('\n'))==(2, '', 1)
    assert p.stderr.startswith('minibatch: ') and argv[-1].strip('-') in p.stderr
    assert not (tmp_path/'minibatch-run').exists()

def test_a_run_that_fails_is_one_line_and_status_1(tmp_path, run, monkeypatch):
    (tmp_path/'file').write_text('')
    (tmp_path/'mnist').mkdir()
    for f in ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'): (tmp_path/'mnist'/f).write_bytes(b'<html>')
    monkeypatch.setenv('MINIBATCH_DATA', str(tmp_path))
    for argv,why in ((['--lr', '1e30'], 'smaller'), (['--out', 'file/x'], 'file/x'), (['--dataset', 'mnist'], 'ubyte')):
        p = run(*argv)
        assert (p.returncode, p.stderr.count('\n'))==(1, 1) and p.stderr.startswith('minibatch: ') and why in p.stderr

def test_help(run):
    p = run('--help')
    assert p.returncode==0 and all(f'--{o} ' in p.stdout for o in 'dataset model epochs bs lr momentum device workers out resume seed'.split())

def test_a_reader_that_leaves_early(tmp_path, bare):
    p = subprocess.Popen([sys.executable, '-c', MAIN], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert b'Traceback' not in p.stderr.read()
    assert p.wait()==1
