"The command `minibatch`, run as a user runs it"
import csv, os, subprocess, sys
import pytest, torch

def run(*argv, cwd, env=(), code='from minibatch.cli import main; raise SystemExit(main())'):
    return subprocess.run([sys.executable, '-c', code, *map(str, argv)], cwd=cwd, env={**os.environ, **dict(env)}, capture_output=True, text=True)

def test_no_argument_trains_on_the_digits(tmp_path, bare):
    p = run(cwd=tmp_path)
    assert p.returncode==0 and p.stderr==''
    *_, last = p.stdout.splitlines()
    assert float(last.split()[1])>0.9 and 'minibatch-run' in last
    rows = list(csv.DictReader(open(tmp_path/'minibatch-run'/'history.csv')))
    assert [int(r['epoch']) for r in rows]==list(range(1, len(rows)+1)) and f"{float(rows[-1]['accuracy']):.4f}"==last.split()[1]
    assert len({len(l) for l in p.stdout.splitlines()[1:-1]})==1                      # the table is aligned
    assert torch.load(tmp_path/'minibatch-run'/'model.pt', weights_only=True)['0.weight'].shape==(50,784)
    assert sorted(f.name for f in (tmp_path/'minibatch-run').iterdir())==['history.csv', 'model.pt']

def test_mnist_in_three_epochs(tmp_path, bare, shared):
    p = run('--dataset', 'mnist', '--epochs', 3, '--out', 'here', cwd=tmp_path, env={'MINIBATCH_DATA': str(shared)})
    assert p.returncode==0 and len(p.stdout.splitlines())==6
    assert float(p.stdout.splitlines()[-1].split()[1])>0.95

def test_the_same_seed_gives_the_same_run(tmp_path, bare):
    losses = [[r.split()[1] for r in run('--seed', s, '--epochs', 2, cwd=tmp_path).stdout.splitlines()[2:4]] for s in (1,1,2)]
    assert losses[0]==losses[1]!=losses[2]

@pytest.mark.parametrize('argv', [['--dataset', 'minst'], ['--epochs', 'many'], ['--epochs', '0'], ['--epochs', '-1'], ['--bs', '0'], ['--bs', '1.5'], ['--bs', str(10**30)], ['--lr', '0'],
                                  ['--lr', 'nan'], ['--lr', 'inf'], ['--seed', '-1'], ['--frobnicate'], ['surplus'], ['--lr']])
def test_bad_use_is_one_line_and_status_2(tmp_path, bare, argv):
    p = run(*argv, cwd=tmp_path)
    assert (p.returncode, p.stdout, p.stderr.count('\n'))==(2, '', 1)
    assert p.stderr.startswith('minibatch: ') and argv[-1].strip('-') in p.stderr
    assert not (tmp_path/'minibatch-run').exists()

def test_a_run_that_fails_is_one_line_and_status_1(tmp_path, bare):
    (tmp_path/'file').write_text('')
    (tmp_path/'mnist').mkdir()
    for f in ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'): (tmp_path/'mnist'/f).write_bytes(b'<html>')
    for argv,env,why in ((['--lr', '1e30'], {}, 'smaller'), (['--out', 'file/x'], {}, 'file/x'), (['--dataset', 'mnist'], {'MINIBATCH_DATA': str(tmp_path)}, 'ubyte')):
        p = run(*argv, cwd=tmp_path, env=env)
        assert (p.returncode, p.stderr.count('\n'))==(1, 1) and p.stderr.startswith('minibatch: ') and why in p.stderr

def test_help(tmp_path):
    p = run('--help', cwd=tmp_path)
    assert p.returncode==0 and all(f'--{o} ' in p.stdout for o in 'dataset epochs bs lr seed out'.split())

def test_a_reader_that_leaves_early(tmp_path, bare):
    p = subprocess.Popen([sys.executable, '-c', 'from minibatch.cli import main; raise SystemExit(main())'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert b'Traceback' not in p.stderr.read()
    assert p.wait()==1
