"The compiled step against `train_step`"
import collections, copy, os, random, shutil, subprocess, sys, warnings
import pytest, torch, torch.nn.functional as F
from contextlib import nullcontext
from dataclasses import dataclass
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from minibatch import speed
from minibatch.data import DataLoader, Dataset
from minibatch.losses import cross_entropy
from minibatch.optim import SGD
from minibatch.speed import compiled_step
from minibatch.training import Accumulate, Callback, Checkpoint, ClipGrad, Schedule, fit, train_step

compiler = pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++') or os.environ.get('CXX')), reason='no C++ compiler')

class Recorder(TorchDispatchMode):
    "Stands in for `CUDAGraph` and `torch.cuda.graph` on a CPU: while it records nothing changes; a replay does the same again in the same memory"
    def __init__(self): super().__init__(); self.ops,self.given,self.made = [],{},{}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tensors((args, kwargs)): self.given.setdefault(at(t), (t.untyped_storage(), t.untyped_storage().clone())) if at(t) not in self.made else None
        out = func(*args, **(kwargs or {}))
        self.made.update({at(t):t for t in tensors(out) if at(t) not in self.given})
        self.ops.append((func, args, kwargs or {}, out))
        return out
    def __enter__(self): self.rng = torch.get_rng_state(); return super().__enter__()
    def __exit__(self, *exc):
        super().__exit__(*exc)
        torch.set_rng_state(self.rng)
        for t in self.made.values(): t.untyped_storage().fill_(255)      # as floats: nan
        for storage,was in self.given.values(): storage.copy_(was)
    @torch.no_grad()
    def replay(self):
        for func,args,kwargs,out in self.ops:
            for t,new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if at(t)!=at(new): t.copy_(new)

def tensors(o): return [t for t in tree_leaves(o) if isinstance(t, torch.Tensor)]
def at(t): return t.untyped_storage().data_ptr()

@pytest.fixture
def recorded(monkeypatch):
    "Steps are recorded as on CUDA; the recorders"
    made,cuda = [],torch.cuda
    class Stream:
        def wait_stream(self, other): assert isinstance(other, Stream)
    for name,f in dict(CUDAGraph=lambda: made.append(Recorder()) or made[-1], graph=lambda g, **kw: g, Stream=Stream, current_stream=lambda d=None: Stream(),
                       stream=lambda s: nullcontext(), device=lambda d: nullcontext()).items(): monkeypatch.setattr(cuda, name, f)
    monkeypatch.setattr(speed, '_records', ('cpu',))
    return made

@pytest.fixture(params=['called','recorded'])
def eager_graphs(monkeypatch, request):
    "The traced graphs as they are, not compiled: everything but the compiler's own work; called as on a CPU, and recorded as on CUDA"
    made = []
    def compile(fx, args, options):
        made.append(fx)
        strides = [t.stride() for t in args]
        def f(*args):
            assert [t.stride() for t in args]==strides        # the compiler relies on them
            return fx(*args)
        return f
    monkeypatch.setattr(torch._inductor, 'compile', compile)
    if request.param=='recorded': request.getfixturevalue('recorded')
    return made

def data(n=50, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return Dataset(torch.randn(n,6,generator=g).to(dtype), torch.randint(3,(n,),generator=g))
def mlp(): return nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,3))
# no bias before BatchNorm: its gradient is 0 but for rounding, which AdamW would scale up
def drop(): return nn.Sequential(nn.Linear(6,16,bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16,3))
class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6,3),nn.Linear(6,3)
    def forward(self, x): return self.a(x)
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.out = nn.Linear(6,6),nn.Linear(6,6),nn.Linear(6,3)
        self.b.weight = self.a.weight
    def forward(self, x): return self.out(self.b(self.a(x).relu()))
def frozen():
    m = mlp()
    m[0].weight.requires_grad_(False)
    return m

def train(step, net=mlp, opt=lambda ps: SGD(ps, lr=0.1), epochs=3, cbs=(), n=50, loss=cross_entropy, sched=False, dtype=torch.float32, valid=None, dl=None):
    torch.manual_seed(1)
    m = net().to(dtype)
    o,dl = opt(m.parameters()),dl or DataLoader(data(n,dtype), batch_size=16, shuffle=True)
    if sched: cbs = [*cbs, Schedule(OneCycleLR(o, 0.05, total_steps=epochs*len(dl)))]
    figures = fit(epochs, m, loss, o, dl, valid, cbs=cbs, progress=False, step=step)
    return m,o,figures

def same(a, b, tol=2e-5):
    for (k,x),y in zip(a.state_dict().items(), b.state_dict().values()):
        assert x.dtype==y.dtype and torch.allclose(x.double(), y.double(), rtol=tol, atol=tol), f'{k}: {(x-y).abs().max()}'

# AdamW divides by the size of the gradients: with its usual eps, 1e-8, what is 0 but for rounding would become a whole step
OPTS = {'ours': lambda ps: SGD(ps, lr=0.1), 'nesterov': lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        'theirs': lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1), 'AdamW': lambda ps: torch.optim.AdamW(ps, lr=0.01, eps=1e-3),
        'dampening': lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5), 'maximize': lambda ps: torch.optim.SGD(ps, lr=0.01, maximize=True),
        'groups': lambda ps: (lambda p: SGD([dict(params=p[:1], lr=0.3), dict(params=p[1:], weight_decay=0.1, momentum=0.5)], lr=0.05))(list(ps))}

@pytest.mark.filterwarnings('error::UserWarning')
@pytest.mark.parametrize('sched', [False, True])
@pytest.mark.parametrize('opt', OPTS.values(), ids=OPTS)
def test_optimizers(eager_graphs, opt, sched):
    (a,oa,fa),(b,ob,fb) = (train(s, opt=opt, sched=sched) for s in (train_step,compiled_step()))
    same(a, b)
    assert fa==pytest.approx(fb, abs=1e-5) and len(eager_graphs)==2            # 16 and the ragged 2; no more in later epochs
    for s,t in zip(oa.state_dict()['state'].values(), ob.state_dict()['state'].values()):
        for k in s: assert torch.allclose(torch.as_tensor(s[k]), torch.as_tensor(t[k]), atol=2e-5), k
    assert all(p.grad is None for p in b.parameters())

NETS = dict(drop=drop, unused=Unused, tied=Tied, frozen=frozen)
@pytest.mark.filterwarnings('error::UserWarning')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('opt', ['nesterov', 'AdamW'])
@pytest.mark.parametrize('net', NETS.values(), ids=NETS)
def test_nets(eager_graphs, net, opt, dtype):
    a,b = (train(s, net, OPTS[opt], dtype=dtype, n=48)[0] for s in (train_step,compiled_step()))
    same(a, b)
    assert len(eager_graphs)==1

@compiler
@pytest.mark.filterwarnings('error::UserWarning')
@pytest.mark.parametrize('opt', ['nesterov', 'AdamW'])
def test_inductor(opt):
    step = compiled_step()
    a,b = (train(s, drop, OPTS[opt], sched=True)[0] for s in (train_step,step))
    same(a, b)
    c = train(step, drop, OPTS[opt], sched=True)[0]
    assert all(x.equal(y) for x,y in zip(b.state_dict().values(), c.state_dict().values()))

class Keep(Callback):
    def before_fit(self, run): self.losses,self.preds = [],[]
    def after_batch(self, run): self.losses.append(run.loss); self.preds.append(run.preds)

def test_recorded_results_stay_and_weights_may_move(recorded, eager_graphs):
    step,keeps,ends = compiled_step(),[],[]
    n = len(recorded)
    for s in (train_step,step):
        torch.manual_seed(1)
        m,keep,dl = mlp(),Keep(),DataLoader(data(40), batch_size=16)
        opt,old = OPTS['nesterov'](m.parameters()),[]
        for _ in range(2):
            fit(2, m, cross_entropy, opt, dl, cbs=keep, progress=False, step=s)
            old += [p.data for p in m.parameters()]                           # kept, so that nothing comes to lie where they are
            for p in m.parameters(): p.data = p.data.clone()
        keeps.append(keep); ends.append(m)
    same(*ends)
    for a,b in zip(keeps[0].losses+keeps[0].preds, keeps[1].losses+keeps[1].preds, strict=True): assert torch.allclose(a, b, atol=1e-5)
    assert len(recorded)==n+4 and all(r.ops for r in recorded)                # 16 rows and 8, before the move and after it

@pytest.mark.filterwarnings('error::UserWarning')
def test_batches_that_are_not_dense(eager_graphs):
    x,y = torch.randn(64,12),torch.arange(64)%3
    ends = []
    for s in (train_step,compiled_step()):
        torch.manual_seed(1)
        m = mlp()
        fit(2, m, F.cross_entropy, SGD(m.parameters(), lr=0.1), [(x[:16,::2],y[:16]), (x[16:32,:6],y[16:32]), (x[:1,:6].expand(9,6),y[:9])], progress=False, step=s)
        ends.append(m)
    same(*ends)

def test_what_cannot_be_recorded_trains_eagerly(recorded, eager_graphs, monkeypatch):
    def graph(g, **kw): raise RuntimeError('operation not permitted when stream is capturing')
    monkeypatch.setattr(torch.cuda, 'graph', graph)
    with pytest.warns(UserWarning, match='eagerly: RuntimeError: operation not permitted') as w: b = train(compiled_step(), drop)[0]
    assert len(w)==1
    assert all(x.equal(y) for x,y in zip(train(train_step, drop)[0].state_dict().values(), b.state_dict().values()))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.filterwarnings('error::UserWarning')
@pytest.mark.parametrize('opt', ['ours','nesterov','theirs','AdamW'])
@pytest.mark.parametrize('net', [mlp, drop, Unused, Tied])
def test_on_a_gpu(net, opt):
    ends = []
    for step in (train_step,compiled_step()):
        with torch.random.fork_rng():
            d = data(50)
            dl = DataLoader(Dataset(d.x.cuda(), d.y.cuda()), batch_size=16, shuffle=True)
            ends.append(train(step, lambda: net().cuda(), OPTS[opt], sched=True, dl=dl)[0])
    same(*ends, tol=1e-4)

def test_several_inputs_and_losses(eager_graphs):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,3),nn.Linear(2,3)
        def forward(self, x, z): return self.a(x)+self.b(z)
    x,y = data().x,data().y
    batches = [(x[i:i+16], x[i:i+16,:2], y[i:i+16]) for i in range(0,48,16)]
    for loss in (cross_entropy, F.cross_entropy, nn.CrossEntropyLoss(weight=torch.tensor([1.,2.,3.]), label_smoothing=0.1)):
        a,b = (train(s, Two, dl=batches, loss=loss)[0] for s in (train_step,compiled_step()))
        same(a, b)
    assert len(eager_graphs)==3

class Go(Callback):
    order = 150                                        # after Checkpoint, whose last state holds `stop`
    def before_fit(self, run): run.stop = False
class Stop(Callback):
    def __init__(self, at): self.at = at
    def after_batch(self, run): run.stop = (run.epoch,run.batch)==self.at

@pytest.mark.parametrize('how', ['called','recorded',pytest.param('compiled', marks=compiler)])
@pytest.mark.parametrize('opt', ['nesterov'])
def test_resumed_bit_for_bit(tmp_path, request, monkeypatch, opt, how):
    if how!='compiled': monkeypatch.setattr(torch._inductor, 'compile', lambda fx, args, options: fx)
    if how=='recorded': request.getfixturevalue('recorded')
    whole = train(compiled_step(), drop, OPTS[opt], sched=True, cbs=[Checkpoint(tmp_path/'a', every=1)])[0]
    for i,at in enumerate([(0,1),(1,2)]):
        path = tmp_path/f'b{i}'
        train(compiled_step(), drop, OPTS[opt], sched=True, cbs=[Checkpoint(path, every=1), Stop(at)])
        again = train(compiled_step(), drop, OPTS[opt], sched=True, cbs=[Checkpoint(path, every=1), Go()])[0]
        assert all(x.equal(y) for x,y in zip(whole.state_dict().values(), again.state_dict().values()))

@pytest.mark.parametrize('cb', [ClipGrad(0.1), Accumulate(2)], ids=['clip', 'accumulate'])
def test_callbacks_inside_the_step(cb):
    step = compiled_step()
    with pytest.warns(UserWarning, match='eagerly: a callback acts') as w: b = train(step, cbs=[cb])[0]
    assert len(w)==1
    with warnings.catch_warnings(): warnings.simplefilter('error'); train(step, cbs=[cb])
    a = train(train_step, cbs=[copy.copy(cb)])[0]
    assert all(x.equal(y) for x,y in zip(a.parameters(), b.parameters()))

class Odd(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.bn,self.l,self.how,self.calls = nn.BatchNorm1d(6),nn.Linear(6,3),how,0
        self.t,self.seen,self.queue,self.g = torch.zeros(6),{0},collections.deque([1]),torch.Generator()
    def forward(self, x):
        y = F.dropout(self.bn(x), 0.2)
        if self.how=='branch' and y.sum()>0: y = y*2
        if self.how=='counter': self.calls += 1; y = y*self.calls
        if self.how=='hidden': self.last = y.detach()
        if self.how=='random': y = y*random.random()
        if self.how=='print': print(f'{y.mean():.3f}')
        if self.how=='in place': self.t += 1; y = y+self.t
        if self.how=='set': self.seen.add(len(self.seen)); y = y*len(self.seen)
        if self.how=='deque': self.queue.append(1); y = y*len(self.queue)
        if self.how=='seed': torch.manual_seed(5); y = F.dropout(y)
        if self.how=='generator': y = y*torch.empty_like(y).bernoulli_(0.5, generator=self.g)
        if self.how=='checkpoint': y = checkpoint(F.dropout, y, use_reentrant=False)
        if self.how=='tuple': return Pair(self.l(y))
        return self.l(y)
class Pair:
    def __init__(self, t): self.t = t

@pytest.mark.parametrize('how', ['branch', 'counter', 'hidden', 'random', 'print', 'tuple', 'in place', 'set', 'deque', 'seed', 'generator', 'checkpoint'])
def test_what_cannot_be_traced(eager_graphs, how, recwarn):
    def loss(p, y): return cross_entropy(p.t if isinstance(p,Pair) else p, y)
    ws = []
    for s in (train_step,compiled_step()):
        random.seed(0)
        torch.manual_seed(1)
        m = Odd(how)
        opt = OPTS['nesterov'](m.parameters())
        fit(2, m, loss, opt, DataLoader(data(), batch_size=16, shuffle=True), metrics=(), progress=False, step=s)
        ws.append(m.state_dict())
    own = [w for w in recwarn if 'compiled_step' in str(w.message)]
    assert len(own)==1 and '\n' not in str(own[0].message)
    assert all(x.equal(y) for x,y in zip(ws[0].values(), ws[1].values()))

class Decayed(nn.Module):
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, p, y): return F.cross_entropy(p, y)+sum(w.pow(2).sum() for w in self.model.parameters())
@dataclass
class Eased:
    eps: float
    def __call__(self, p, y): return F.cross_entropy(p, y, label_smoothing=self.eps)
def closing(m): return lambda p, y: F.cross_entropy(p, y)+m[0].weight.abs().sum()

@pytest.mark.parametrize('make,why', [(Decayed,'do not come through the model'), (closing,'do not come through the model'), (lambda m: Eased(0.2),None)])
def test_losses_with_weights_and_without_a_hash(eager_graphs, make, why):
    ends = []
    for s in (train_step,compiled_step()):
        torch.manual_seed(1)
        m = mlp()
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            fit(2, m, make(m), SGD(m.parameters(), lr=0.05), DataLoader(data(), batch_size=16), metrics=(), progress=False, step=s)
        assert [x for x in w if why and why in str(x.message)] or not why or s is train_step
        ends.append(m)
    same(*ends)

def test_weights_of_a_loss_that_change(eager_graphs):
    class Reweigh(Callback):
        def before_epoch(self, run): run.loss_func.weight = torch.tensor([1.,1.+run.epoch,0.1])
    ends = [train(s, cbs=[Reweigh()], loss=nn.CrossEntropyLoss(weight=torch.ones(3)))[0] for s in (train_step,compiled_step())]
    same(*ends)
    assert len(eager_graphs)>=6

class Sparse(nn.Module):
    def __init__(self): super().__init__(); self.e,self.l = nn.Embedding(5, 4, sparse=True),nn.Linear(4,3)
    def forward(self, x): return self.l(self.e((x.abs()*9).long()%5).mean(1))
def lazy(): return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))

@pytest.mark.filterwarnings('ignore:Lazy modules')
@pytest.mark.parametrize('net', [Sparse, lazy])
def test_sparse_gradients_and_lazy_layers(net):
    ends = []
    for s in (train_step,compiled_step()):
        torch.manual_seed(1)
        m,dl = net(),DataLoader(data(), batch_size=16)
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            fit(1, m, F.cross_entropy, torch.optim.SGD(m.parameters(), lr=0.05), dl, metrics=(), progress=False, step=s)
        assert s is train_step or any('trains eagerly' in str(x.message) for x in w)
        ends.append(m)
    assert all(x.equal(y) for x,y in zip(ends[0].state_dict().values(), ends[1].state_dict().values()))

def test_own_optimizer_and_hooks(eager_graphs):
    class Own(torch.optim.Optimizer):
        def __init__(self, ps): super().__init__(ps, dict(lr=0.1))
        @torch.no_grad()
        def step(self):
            for g in self.param_groups:
                for p in g['params']:
                    if p.grad.norm().item()>0.1: p -= g['lr']*p.grad
    a,b = (train(s, opt=Own)[0] for s in (train_step,compiled_step()))
    same(a, b)
    seen = []
    for register in 'register_forward_hook','register_forward_pre_hook','register_full_backward_hook','register_full_backward_pre_hook':
        def net(): m = mlp(); getattr(m[2], register)(lambda *_: seen.append(1)); return m
        with pytest.warns(UserWarning, match='hooks'): train(compiled_step(), net)
    assert len(seen)==4*12

def test_without_a_compiler(tmp_path):
    code = '''
import warnings, torch
from test_compiled import *
with warnings.catch_warnings(record=True) as w:
    warnings.simplefilter('always')
    a,b = (train(s, drop, OPTS['nesterov'])[0] for s in (train_step,compiled_step()))
own = [str(x.message) for x in w if 'compiled_step' in str(x.message)]
assert len(own)==1 and 'ompiler' in own[0].split('eagerly')[1], own
assert all(x.equal(y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))
print('fine', own)
'''
    env = dict(os.environ, CXX='/nonexistent', PATH='', TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
               PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    r = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert r.stdout.startswith('fine'), r.stdout+r.stderr

def test_changes_between_and_within_fits(eager_graphs):
    class Freeze(Callback):
        def before_epoch(self, run): run.model[0].requires_grad_(run.epoch>0)
    class Wet(Callback):
        def before_epoch(self, run):
            for m in run.model.modules():
                if isinstance(m, nn.Dropout): m.p = 0.5*(run.epoch%2)
    ends = []
    for s in (train_step,compiled_step()):
        made = len(eager_graphs)
        torch.manual_seed(0)
        m,dl = drop(),DataLoader(data(48), batch_size=16)
        opt = OPTS['nesterov'](m[:4].parameters())
        def go(epochs=2, cbs=()): fit(epochs, m, cross_entropy, opt, dl, cbs=cbs, progress=False, step=s)
        go(3, [Freeze()]); go(3, [Wet()])
        saved = opt.state_dict()
        opt = OPTS['nesterov'](m[:4].parameters())
        opt.load_state_dict(saved)
        go()
        opt.add_param_group(dict(params=m[4].parameters(), lr=0.05)); go()
        m[1].eval(); m.double(); m.float(); go()
        opt = OPTS['AdamW'](m.parameters()); go()
        ends.append(m)
    same(*ends, tol=1e-4)
    if speed._records==('cuda',): assert len(eager_graphs)==6        # frozen, all, p=0, p=0.5, two groups, AdamW: none twice

def test_reads_predictions_and_twice_the_same(eager_graphs):
    step = compiled_step()
    a = train(train_step)[2]
    b = train(step)[2]                                 # metrics come from run.preds
    assert a==pytest.approx(b, abs=1e-5)
    n = len(eager_graphs)
    m = mlp(); o = SGD(m.parameters(), lr=0.1)
    for _ in range(2): fit(1, m, cross_entropy, o, DataLoader(data(), batch_size=16), progress=False, step=step)
    assert len(eager_graphs)==n+2

def test_batches_that_are_not_tensors():
    x,y = data().x,data().y
    batches = [(x[i:i+16], dict(y=y[i:i+16])) for i in range(0,48,16)]
    def go(step):
        torch.manual_seed(1)
        m = mlp()
        fit(2, m, lambda p,t: F.cross_entropy(p, t['y']), SGD(m.parameters(), lr=0.1), batches, metrics=(), progress=False, step=step)
        return m
    with pytest.warns(UserWarning, match='other things than tensors') as w: b = go(compiled_step())
    assert len(w)==1 and all(p.equal(q) for p,q in zip(go(train_step).parameters(), b.parameters()))

@compiler
@pytest.mark.parametrize('loss', [F.cross_entropy, cross_entropy])
def test_a_label_out_of_range_is_the_same_error(loss):
    x,y = data().x[:16],data().y[:16].clone()
    bad = y.clone(); bad[3] = 3
    step,said = compiled_step(),[]
    for s in (train_step,step):
        with pytest.raises(IndexError) as e: train(s, loss=loss, dl=[(x,y),(x,bad)])
        said.append(str(e.value))
    assert said[0]==said[1]
    same(train(train_step, dl=[(x,y)]*3)[0], train(step, dl=[(x,y)]*3)[0])           # and training goes on

class Attrs(nn.Module):
    "Whatever may change between two epochs"
    def __init__(self):
        super().__init__()
        self.l,self.act,self.m,self.scales,self.order,self.a,self.b,self.t = nn.Linear(6,3),torch.relu,nn.Tanh(),[1.,2.],(0,1,2),3.,None,torch.ones(3)
        self.register_buffer('mean', torch.zeros(3))
    def forward(self, x):
        y = self.m(self.l(x))*self.scales[0] + self.act(self.l(x))*self.scales[1]
        y = y[:,list(self.order)] + (self.a or 0)*y**2 - (self.b or 0)*y**3 + self.t
        if self.training: self.mean = 0.9*self.mean + y.detach().mean(0)      # a buffer set anew
        return y + 0.1*self.mean
class Smooth:
    eps = 0.
    def loss(self, p, y): return F.cross_entropy(p, y, label_smoothing=self.eps)
def shrink(p): p.grad.mul_(0.1)
def swap(m, l): m.a,m.b = None,3.
CHANGES = dict(module=lambda m,l: setattr(m, 'm', nn.Sigmoid()), function=lambda m,l: setattr(m, 'act', torch.sigmoid), list=lambda m,l: m.scales.reverse(),
               tuple=lambda m,l: setattr(m, 'order', (2,0,1)), names=swap, tensor=lambda m,l: setattr(m, 't', torch.tensor([1.,0.,-1.])), loss=lambda m,l: setattr(l, 'eps', 0.5),
               frozen=lambda m,l: m.l.weight.requires_grad_(False))

@pytest.mark.filterwarnings('error::UserWarning')
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_changes_between_epochs(eager_graphs, change):
    ends = []
    for step in (train_step,compiled_step()):
        smooth = Smooth()
        class Change(Callback):
            def before_epoch(self, run): run.epoch==1 and change(run.model, smooth)
        ends.append(train(step, Attrs, OPTS['nesterov'], n=48, loss=smooth.loss, cbs=[Change()], dtype=torch.float64)[0])
    same(*ends)
    assert len(eager_graphs)==2

@pytest.mark.filterwarnings('error::UserWarning')
@pytest.mark.parametrize('option', ['momentum', 'weight_decay', 'lr'])
def test_options_that_change_in_every_batch(eager_graphs, option):
    class Change(Callback):
        def before_batch(self, run):
            for g in run.opt.param_groups: g[option] = [0,0.1,0.5][run.batch%3]
    a,b = (train(s, n=48, cbs=[Change()])[0] for s in (train_step,compiled_step()))
    same(a, b)
    assert len(eager_graphs)==(1 if option=='lr' else 2)

@pytest.mark.parametrize('kind', ['register_hook', 'register_post_accumulate_grad_hook'])
def test_hooks_of_parameters(kind):
    def net():
        m = mlp()
        if kind=='register_hook': m[0].weight.register_hook(lambda g: 0.1*g)
        else: m[0].weight.register_post_accumulate_grad_hook(shrink)
        return m
    with pytest.warns(UserWarning, match='a parameter has hooks'): b = train(compiled_step(), net)[0]
    a = train(train_step, net)[0]
    assert all(p.equal(q) for p,q in zip(a.parameters(), b.parameters()))

class Counting(nn.Module):
    "A loss that keeps something for itself"
    def __init__(self, how): super().__init__(); self.how,self.n,self.log,self.run = how,0,[],torch.zeros(())
    def forward(self, p, y):
        loss = F.cross_entropy(p, y)
        if self.how=='number': self.n += 1; return loss*(1+0.1*self.n)
        if self.how=='tensor': self.run = 0.9*self.run + loss.detach(); return loss*(1+self.run)
        self.log.append(loss.detach()); return loss

@pytest.mark.parametrize('how', ['number', 'tensor', 'log'])
def test_a_loss_with_a_state_is_not_compiled(eager_graphs, how):
    losses,ends = [Counting(how) for _ in 'ab'],[]
    for loss,step in zip(losses, (train_step,compiled_step())):
        with warnings.catch_warnings(record=True) as w: warnings.simplefilter('always'); ends.append(train(step, loss=loss)[0])
        assert len([x for x in w if 'is changed in each batch' in str(x.message)])==(step is not train_step)
    assert all(p.equal(q) for p,q in zip(*(m.parameters() for m in ends)))
    assert losses[0].n==losses[1].n and len(losses[0].log)==len(losses[1].log) and all(type(t) is torch.Tensor for t in [losses[1].run, *losses[1].log])

def test_models_are_not_kept_alive(eager_graphs):
    import gc, weakref
    step = compiled_step()
    refs = [weakref.ref(train(step, n=48)[0]) for _ in range(3)]
    gc.collect()
    assert [r() for r in refs]==[None]*3
