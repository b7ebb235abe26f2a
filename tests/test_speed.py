"`race` on contenders of known cost, by a clock of our own; the ladder's contenders against PyTorch in float64; the command line"
import csv, random, subprocess, sys
from types import ModuleType
import matplotlib; matplotlib.use('agg')
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode
from minibatch import speed
from minibatch.datasets import get_data
from minibatch.models import mlp
from minibatch.speed import Race, ceilings, epoch_cost, ladder, main, race

class Clock:
    "Time passes only when `work` is called"
    def __init__(self): self.t,self.calls = 0.,[]
    def now(self): return self.t
    def work(self, name, secs):
        def f(): self.t += secs; self.calls.append(name); return secs
        return f

costs = st.dictionaries(st.text(min_size=1, max_size=5), st.floats(1e-6, 1e3), min_size=1, max_size=5)

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
    firsts = c.calls[::2]
    assert 8<firsts.count('a')<32
    assert random.getstate()==before[0] and torch.equal(torch.get_rng_state(), before[1])

def test_quartiles_and_outliers():
    c = Clock(); secs = iter([9999., *range(1,100), 5000.])      # the first is warm-up
    def f(): c.t += next(secs)
    row, = race(100, 1, c.now, f=f).rows
    assert row['median']==50.5 and (row['low'],row['high'])==pytest.approx((25.75,75.25))

def test_slow_phase_meets_all():
    class Slowing(Clock):
        def work(self, name, secs):
            def f(): self.t += secs*(1+self.t/50)
            return f
    m = Slowing()
    r = race(100, 0, m.now, a=m.work('a',.1), b=m.work('b',.1), c=m.work('c',.3))
    assert [row['ratio'] for row in r.rows]==pytest.approx([1,1,3], rel=.03)

@pytest.mark.parametrize('when', [0,1,4])
@pytest.mark.parametrize('first', [True,False])
def test_one_raises(when, first):
    c,n = Clock(),iter(range(99))
    def bad():
        if next(n)>=when: raise ValueError('pipe | and\nnewline')
        c.t += 1
    r = race(5, 1, c.now, **({'bad':bad} if first else {}), good=c.work('good',2.), other=c.work('other',4.), **({} if first else {'bad':bad}))
    rows = {row['contender']:row for row in r.rows}
    assert rows['bad']['note']=='ValueError: pipe / and newline' and rows['bad']['median'] is None is rows['bad']['ratio']
    assert next(n)==when+1                                       # not called again
    assert rows['good']['median']==2 and rows['other']['ratio']==(None if first else 2)
    assert 'ValueError: pipe / and newline' in str(r)
    assert len(r.plot('title').patches)==2

def test_returns_at_once():
    c = Clock()
    def generator(): c.t += 1; yield
    r = race(5, 1, c.now, work=c.work('work',1.), gen=generator)
    assert 'too fast to time' in r.rows[1]['note'] and r.rows[0]['note']==''
    ticks = iter(range(10**6))                                   # every look at the clock takes 1: an empty call takes 1, too
    assert 'too fast' in race(3, 1, lambda: next(ticks), f=lambda: None).rows[0]['note']
    def slow(): [next(ticks) for _ in range(10)]
    assert race(3, 1, lambda: next(ticks), f=slow).rows[0]['median']==11

def test_all_fail():
    r = race(2, f=lambda: 1/0, g=lambda: None)
    assert [bool(row['note']) for row in r.rows]==[True,True]
    assert str(r).count('\n')==3 and not r.plot().patches

def test_bad_use():
    for args in (0,), (-1,), (1,-1): pytest.raises(ValueError, race, *args, f=print).match('repeats and')
    pytest.raises(ValueError, race).match('Nothing to time')
    for bad in 5, None, 'f': pytest.raises(TypeError, race, f=bad).match('f is .*expected a function')
    with pytest.raises(KeyboardInterrupt): race(f=lambda: (_ for _ in ()).throw(KeyboardInterrupt))

def test_any_name():
    c = Clock()
    names = ['repeats','warmup','clock','self','a b','contenders','name']
    assert [row['contender'] for row in race(2, 0, c.now, **{k:c.work(k,1) for k in names}).rows]==names

def test_gpu_is_waited_for(monkeypatch):
    c = Clock(); queued = [0.]
    def sync(): c.t += queued[0]; queued[0] = 0.
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'synchronize', sync)
    def launch(): c.t += 1; queued[0] += 10
    queued[0] = 500.                                             # someone else's work is not counted
    assert race(3, 0, c.now, f=launch).times['f']==[11.]*3

@settings(deadline=None, max_examples=50)
@given(costs, st.integers(0,4))
def test_table_is_aligned_markdown(costs, bad):
    names = [k.replace('|','').replace('\n','').replace('\r','').strip() or 'x' for k in costs]
    times = {k:[v]*3 for k,v in zip(names, costs.values())}
    notes = {k:'broken' for k in list(times)[:bad]}
    lines = str(Race(times, {}, notes)).split('\n')
    assert len(lines)==2+len(times) and len({len(l) for l in lines})==1 and len({l.count('|') for l in lines})==1
    assert set(lines[1])<=set('|-: ')

@pytest.mark.parametrize('secs,text', [(2e-9,'2.00 ns'), (1.5e-6,'1.50 µs'), (0.0123,'12.3 ms'), (0.5,'500 ms'), (61,'61.0 s'), (0,'0.00 ns')])
def test_time(secs, text): assert speed._time(secs)==text

@pytest.mark.parametrize('n,n_valid,sizes', [(7,3,(784,50,10)), (64,0,(20,5,3))])
def test_cost_is_pytorchs(n, n_valid, sizes):
    net = mlp(*sizes)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(torch.rand(n, sizes[0])), torch.zeros(n).long()).backward()
        with torch.no_grad(): net(torch.rand(n_valid, sizes[0]))
    assert epoch_cost(n, n_valid, *sizes)==(counter.get_total_flops(), torch.rand(n+n_valid, sizes[0]).nbytes)

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
    return ws

@pytest.mark.parametrize('f', [speed._by_hand, speed._bare])
def test_contenders_train(f, small):
    torch.manual_seed(0); net = mlp(784, 20, 10)
    torch.manual_seed(5); want = reference(net, small, 64, 0.1, torch.randperm(200))
    torch.manual_seed(5); acc = f(net, small, 64, 0.1)
    for p,w in zip(net.parameters(), want): torch.testing.assert_close(p.detach().double(), w.detach(), rtol=1e-4, atol=1e-5)
    assert acc==pytest.approx((net(small[2]).argmax(1)==small[3]).float().mean().item())

@pytest.mark.parametrize('f', [speed._fit, speed._fit_ours, speed._torch_loop])
def test_loaders_train(f, small):
    "One batch of all rows: then the order does not matter"
    torch.manual_seed(0); net = mlp(784, 20, 10)
    want = reference(net, small, 200, 0.1, torch.arange(200))
    acc = f(net, small, 200, 0.1)
    for p,w in zip(net.parameters(), want): torch.testing.assert_close(p.detach().double(), w.detach(), rtol=1e-4, atol=1e-5)
    assert acc==pytest.approx((net(small[2]).argmax(1)==small[3]).float().mean().item())

def test_ladder(small):
    runs = ladder(small, bs=32, nh=10)
    assert next(iter(runs))=='bare loop' and runs['bare loop']()==runs['bare loop']()       # always from the same start
    assert 0<=runs['fit']()<=1
    x,y,xv,yv = small
    few = y<5
    assert 0<=ladder((x[few],y[few],xv,yv))['bare loop']()<=1        # a class that only validation has

@pytest.mark.parametrize('name,module', [('skorch','skorch'), ('Lightning','lightning'), ('fastai','fastai'), ('Keras','keras')])
def test_peers(name, module, small, monkeypatch):
    "Installed or not, broken or not, there is a row"
    runs = ladder(small)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f'{module}.callback', None)
    assert 'ModuleNotFoundError' in race(1, 0, **{name:runs[name]}).rows[0]['note']
    broken = ModuleType(module); broken.__path__ = []
    monkeypatch.setitem(sys.modules, module, broken)
    assert race(1, 0, **{name:runs[name]}).rows[0]['note']

@pytest.mark.parametrize('name', ['skorch','Lightning','fastai','Keras'])
def test_peers_train(name, small, tmp_path, monkeypatch):
    pytest.importorskip(name.lower())
    monkeypatch.chdir(tmp_path)
    assert 0.1<ladder(small, bs=10)[name]()<=1
    assert not [*tmp_path.iterdir()]

def test_command(tmp_path, capsys):
    assert main(['--dataset','digits','--repeats','1','--nh','5','--out',str(tmp_path/'a'/'b')])==0
    out = capsys.readouterr().out
    md,png = (tmp_path/'a'/'b'/'speed.md').read_text(encoding='utf-8'),(tmp_path/'a'/'b'/'speed.png').read_bytes()
    rows = [*csv.DictReader((tmp_path/'a'/'b'/'speed.csv').open(newline=''))]
    assert [r['contender'] for r in rows]==[*ladder(get_data('digits'))]
    for r in rows: assert f"| {r['contender']} " in md and r['note'] in out and bool(r['median'])!=bool(r['note'])
    assert png.startswith(b'\x89PNG') and 'digits' in md and torch.__version__ in md
    assert sorted(p.name for p in (tmp_path/'a'/'b').iterdir())==['speed.csv','speed.md','speed.png']

@pytest.mark.parametrize('argv,status', [(['--repeats','0'],2), (['--bs','0'],2), (['--nh','-1'],2), (['--lr','nan'],2), (['--dataset','minst'],2),
                                         (['--bs','many'],2), (['--what'],2), (['--dataset','digits','--out',__file__],1)])
def test_command_errors(argv, status, capsys):
    try: got = main(argv)
    except SystemExit as e: got = e.code
    err = capsys.readouterr().err
    assert got==status and err.startswith('minibatch.speed: ') and err.count('\n')==1 and 'Traceback' not in err

def test_module_runs_and_all_does_not_import_it():
    code = "import sys, minibatch, minibatch.all; assert not {'minibatch.speed','skorch','keras','matplotlib'} & {*sys.modules}"
    assert subprocess.run([sys.executable, '-c', code]).returncode==0
    r = subprocess.run([sys.executable, '-m', 'minibatch.speed', '--repeats', '0'], capture_output=True, text=True)
    assert (r.returncode,r.stdout)==(2,'') and r.stderr.startswith('minibatch.speed: --repeats is 0') and r.stderr.count('\n')==1
