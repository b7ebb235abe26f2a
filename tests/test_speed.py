"`race` on contenders of known cost, by a clock of our own; the ladder's contenders against PyTorch in float64; the command line"
import csv, random, subprocess, sys
from types import ModuleType
import matplotlib; matplotlib.use('agg')
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.nn.utils import parameters_to_vector
from torch.utils.flop_counter import FlopCounterMode
from minibatch import speed
from minibatch.datasets import get_data
from minibatch.models import mlp
from minibatch.speed import ceilings, epoch_cost, ladder, main, race

class Clock:
    "Time passes only when `work` is called"
    def __init__(self): self.t,self.calls = 0.,[]
    def now(self): return self.t
    def work(self, name, secs):
        def f(): self.t += secs; self.calls.append(name); return secs
        return f

names = st.text(min_size=1, max_size=5)
costs = st.dictionaries(names, st.floats(1e-6, 1e3), min_size=1, max_size=5)

@settings(deadline=None, max_examples=60)
@given(costs, st.integers(1,6), st.integers(0,3))
def test_known_ratios(costs, repeats, warmup):
    c = Clock()
    r = race(repeats, warmup, c.now, **{k:c.work(k,v) for k,v in costs.items()})
    first = next(iter(costs.values()))
    for row,(k,v) in zip(r.rows, costs.items(), strict=True):
        assert row['contender']==k and row['note']=='' and row['result']==v
        for q in 'low','median','high': assert row[q]==pytest.approx(v, rel=1e-5)
        assert row['ratio']==pytest.approx(v/first, rel=1e-5) and r[k]==row['median']
    n = len(costs)                                  # every round has everybody once
    rounds = [c.calls[i:i+n] for i in range(0, len(c.calls), n)]
    assert len(rounds)==repeats+warmup and all(sorted(x)==sorted(costs) for x in rounds)
    assert all(len(t)==repeats for t in r.times.values())

def test_order_changes_and_global_seed_does_not():
    c = Clock(); random.seed(3); torch.manual_seed(3)
    before = random.getstate(),torch.get_rng_state()
    race(40, 0, c.now, a=c.work('a',1), b=c.work('b',1))
    assert 8<c.calls[::2].count('a')<32
    assert random.getstate()==before[0] and torch.equal(torch.get_rng_state(), before[1])

def test_quartiles_and_outliers():
    c = Clock(); secs = iter([9999., *range(1,100), 5000.])      # the first is warm-up
    def f(): c.t += next(secs)
    row, = race(100, 1, c.now, f=f).rows
    assert row['median']==50.5 and (row['low'],row['high'])==pytest.approx((25.75,75.25))

@pytest.mark.parametrize('when', [0,1,4])
@pytest.mark.parametrize('first', [True,False])
def test_one_raises(when, first):
    c,n = Clock(),iter(range(99))
    def bad():
        if next(n)>=when: raise ValueError('pipe | and\nnewline')
        c.t += 1
    good = dict(good=c.work('good',2.), other=c.work('other',4.))
    r = race(5, 1, c.now, **(dict(bad=bad, **good) if first else dict(**good, bad=bad)))
    rows = {row['contender']:row for row in r.rows}
    assert rows['bad']['note']=='ValueError: pipe / and newline'
    assert rows['bad']['median'] is None is rows['bad']['ratio']
    assert next(n)==when+1                                       # not called again
    assert rows['good']['median']==2 and rows['other']['ratio']==(None if first else 2)
    assert 'ValueError: pipe / and newline' in str(r)
    assert len(r.plot('title').patches)==2

def test_returns_at_once():
    c = Clock()
    def generator(): c.t += 1; yield
    r = race(5, 1, c.now, work=c.work('work',1.), gen=generator)
    assert 'too fast to time' in r.rows[1]['note'] and r.rows[0]['note']==''
    ticks = iter(range(10**6))                                   # each look at the clock takes 1
    assert 'too fast' in race(3, 1, lambda: next(ticks), f=lambda: None).rows[0]['note']
    def slow(): [next(ticks) for _ in range(10)]
    assert race(3, 1, lambda: next(ticks), f=slow).rows[0]['median']==11

def test_all_fail():
    r = race(2, f=lambda: 1/0, g=lambda: None)
    assert [bool(row['note']) for row in r.rows]==[True,True]
    assert str(r).count('\n')==3 and not r.plot().patches

def test_bad_use():
    for args in (0,), (-1,), (1,-1): pytest.raises(ValueError, race, *args, f=print).match('repeats, ')
    pytest.raises(ValueError, race).match('0 functions')
    for bad in 5, None, 'f': pytest.raises(TypeError, race, f=bad).match('f is .*expected a function')
    with pytest.raises(KeyboardInterrupt): race(f=lambda: (_ for _ in ()).throw(KeyboardInterrupt))

def test_any_name():
    c = Clock()
    names = ['repeats','warmup','clock','self','a b','contenders','k']
    r = race(2, 0, c.now, **{k:c.work(k,1) for k in names})
    assert [row['contender'] for row in r.rows]==names

def test_gpu_is_waited_for(monkeypatch):
    c = Clock(); queued = [0.]
    def sync(): c.t += queued[0]; queued[0] = 0.
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'synchronize', sync)
    def launch(): c.t += 1; queued[0] += 10
    queued[0] = 500.                                             # someone else's work is not counted
    assert race(3, 0, c.now, f=launch).times['f']==[11.]*3

def test_table_is_aligned_markdown():
    r = speed.Race(dict(a=[1e-3]*3, longer=[2.]*3, none=[]), dict(a=0.5), dict(none='broken'))
    lines = str(r).split('\n')
    assert len({len(l) for l in lines})==1 and {l.count('|') for l in lines}=={6}
    assert set(lines[1])<=set('|- ') and '2.0 s' in lines[3] and 'broken' in lines[4]

@pytest.mark.parametrize('n,n_valid,sizes', [(7,3,(784,50,10)), (64,0,(20,5,3))])
def test_cost_is_pytorchs(n, n_valid, sizes):
    net = mlp(*sizes)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(torch.rand(n, sizes[0])), torch.zeros(n).long()).backward()
        with torch.no_grad(): net(torch.rand(n_valid, sizes[0]))
    want = counter.get_total_flops(),torch.rand(n+n_valid, sizes[0]).nbytes
    assert epoch_cost(n, n_valid, *sizes)==want

def test_ceilings():
    flops,nbytes = ceilings(64, 1)
    assert flops>0 and nbytes>0

@pytest.fixture(scope='module')
def small():
    x,y,xv,yv = get_data('digits')
    return x[:200],y[:200],xv[:100],yv[:100]

def reference(net, data, bs, lr, order):
    "The epoch in float64, with gradients by autograd and updates by hand"
    x,y = data[0].double(),data[1]
    ws = [p.detach().double().requires_grad_() for p in net.parameters()]
    for i in order.split(bs):
        loss = F.cross_entropy((x[i]@ws[0].t()+ws[1]).relu()@ws[2].t()+ws[3], y[i])
        for w,g in zip(ws, torch.autograd.grad(loss, ws)): w.data -= lr*g
    return parameters_to_vector(ws).detach()

def check(f, net, data, bs, want):
    torch.manual_seed(5)
    acc = f(net, data, bs, 0.1)
    got = parameters_to_vector(net.parameters()).detach()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert acc==pytest.approx((net(data[2]).argmax(1)==data[3]).float().mean().item())

@pytest.mark.parametrize('bs', [64,50,500])          # a ragged last batch, none, and no full one
@pytest.mark.parametrize('name', ['bare','by_hand','numpy','jax'])
def test_contenders_train(name, bs, small):
    "The same weights in the same order of batches give the same weights"
    if name=='jax': pytest.importorskip('jax')
    torch.manual_seed(0); net = mlp(784, 20, 10)
    torch.manual_seed(5); want = reference(net, small, bs, 0.1, torch.randperm(200))
    check(getattr(speed, f'_{name}'), net, small, bs, want)

@pytest.mark.parametrize('f', [speed._fit, speed._fit_ours, speed._torch_loop])
def test_loaders_train(f, small):
    "One batch of all rows: then the order does not matter"
    torch.manual_seed(0); net = mlp(784, 20, 10)
    check(f, net, small, 200, reference(net, small, 200, 0.1, torch.arange(200)))

def test_jax_compiles_once_for_each_shape(small, capfd):
    pytest.importorskip('jax')
    run = ladder(small, bs=32)['JAX']
    acc = run()
    compiled = speed._jax_steps()._cache_size()
    assert run()==acc and speed._jax_steps()._cache_size()==compiled
    assert capfd.readouterr()==('','')

def test_ladder(small):
    runs = ladder(small, bs=32, nh=10)
    assert next(iter(runs))=='bare loop'
    assert runs['bare loop']()==runs['bare loop']()==runs['NumPy']()      # the same start and order
    assert 0<=runs['fit']()<=1
    x,y,xv,yv = small
    few = y<5                                        # classes that only validation has
    assert 0<=ladder((x[few],y[few],xv,yv))['bare loop']()<=1

peers = ['jax','skorch','lightning','fastai','keras']
def row_of(name, data): # of the race of that peer alone
    runs = {k:f for k,f in ladder(data, bs=10).items() if k.lower()==name}
    return race(1, 0, **runs).rows[0]

@pytest.mark.parametrize('name', peers)
def test_peer_that_is_missing(name, small, monkeypatch):
    "Installed or not, there is a row"
    speed._jax_steps.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f'{name}.callback', None)
    assert 'ModuleNotFoundError' in row_of(name, small)['note']

@pytest.mark.parametrize('name', peers)
def test_peers_train(name, small, tmp_path, monkeypatch):
    pytest.importorskip(name, exc_type=Exception)    # a broken companion of it is not our error
    monkeypatch.chdir(tmp_path)
    row = row_of(name, small)
    assert row['note']=='' and 0.1<row['result']<=1
    assert not [*tmp_path.iterdir()]

def test_command(tmp_path, capsys):
    out = tmp_path/'a'/'b'
    assert main(['--dataset','digits','--repeats','1','--nh','5','--out',str(out)])==0
    md,shown = (out/'speed.md').read_text(encoding='utf-8'),capsys.readouterr().out
    rows = [*csv.DictReader((out/'speed.csv').open(newline=''))]
    assert [r['contender'] for r in rows]==[*ladder(get_data('digits'))]
    for r in rows:
        assert f"| {r['contender']} " in md and r['note'] in shown
        assert bool(r['median'])!=bool(r['note'])
    assert (out/'speed.png').read_bytes().startswith(b'\x89PNG')
    assert 'digits' in md and torch.__version__ in md

@pytest.mark.parametrize('argv,status', [
    (['--repeats','0'],2), (['--bs','0'],2), (['--nh','-1'],2), (['--lr','nan'],2),
    (['--dataset','minst'],2), (['--bs','many'],2), (['--what'],2),
    (['--dataset','digits','--out',__file__],1)])
def test_command_errors(argv, status, capsys):
    try: got = main(argv)
    except SystemExit as e: got = e.code
    err = capsys.readouterr().err
    assert got==status and err.startswith('minibatch.speed: ') and err.count('\n')==1

def test_module_runs_and_all_does_not_import_it():
    code = ("import sys, minibatch, minibatch.all; "
            "assert not {'minibatch.speed','skorch','keras','jax','matplotlib'} & {*sys.modules}")
    assert subprocess.run([sys.executable, '-c', code]).returncode==0
    r = subprocess.run([sys.executable, '-m', 'minibatch.speed', '--repeats', '0'],
                       capture_output=True, text=True)
    assert (r.returncode,r.stdout)==(2,'') and r.stderr.count('\n')==1
    assert r.stderr.startswith('minibatch.speed: --repeats is 0')
