"The compiled step against `train_step`"
import copy, os, shutil, warnings
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from minibatch.all import *

compiler = pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++') or os.environ.get('CXX')), reason='no C++ compiler')
quiet = pytest.mark.filterwarnings('error:compiled_step')      # a step that is eager would prove nothing

class Count:
    "A backend that runs the graphs as they are, and counts them"
    def __init__(self): self.n = 0
    def __call__(self, gm, inputs): self.n += 1; return gm.forward

def data(n=50, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return Dataset(torch.randn(n,6,generator=g).to(dtype), torch.randint(3,(n,),generator=g))
def net(): return nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,3))
# no bias before BatchNorm: its gradient is 0 but for rounding, which AdamW would scale up
def drop(): return nn.Sequential(nn.Linear(6,16,bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16,3))
def momentumless(): return nn.Sequential(nn.Linear(6,4), nn.BatchNorm1d(4, momentum=None, affine=False), nn.Linear(4,3))
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
    m = net()
    m[0].weight.requires_grad_(False)
    return m

def train(step, make=net, opt=lambda ps: SGD(ps, lr=0.1), epochs=2, cbs=(), n=50, loss=cross_entropy, sched=False, dtype=torch.float32, dl=None):
    torch.manual_seed(1)
    m = make().to(dtype)
    o,dl = opt(m.parameters()),dl or DataLoader(data(n,dtype), batch_size=16, shuffle=True)
    if sched: cbs = [*cbs, Schedule(OneCycleLR(o, 0.05, total_steps=epochs*len(dl)))]
    return m,o,fit(epochs, m, loss, o, dl, cbs=cbs, progress=False, step=step)

def same(a, b, tol=2e-5):
    for (k,x),y in zip(a.state_dict().items(), b.state_dict().values()):
        assert x.dtype==y.dtype and torch.allclose(x.double(), y.double(), rtol=tol, atol=tol), f'{k}: {(x-y).abs().max()}'

# AdamW divides by the size of the gradients: with its usual eps, 1e-8, what is 0 but for rounding would become a whole step
OPTS = {'ours': lambda ps: SGD(ps, lr=0.1), 'nesterov': lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        'theirs': lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1), 'AdamW': lambda ps: torch.optim.AdamW(ps, lr=0.01, eps=1e-3),
        'dampening': lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5), 'maximize': lambda ps: torch.optim.SGD(ps, lr=0.01, maximize=True),
        'groups': lambda ps: (lambda p: SGD([dict(params=p[:1], lr=0.3), dict(params=p[1:], weight_decay=0.1, momentum=0.5)], lr=0.05))(list(ps))}

@quiet
@pytest.mark.parametrize('sched', [False, True])
@pytest.mark.parametrize('opt', OPTS.values(), ids=OPTS)
def test_optimizers(opt, sched):
    "Weights, figures and the optimizer's state; 16 rows and the ragged 2 are two graphs, however often the schedule changes lr and momentum"
    c = Count()
    (a,oa,fa),(b,ob,fb) = (train(s, opt=opt, sched=sched, epochs=3) for s in (train_step,compiled_step(backend=c)))
    same(a, b)
    assert fa==pytest.approx(fb, abs=1e-5) and c.n==2
    for s,t in zip(oa.state_dict()['state'].values(), ob.state_dict()['state'].values()):
        for k in s: assert torch.allclose(torch.as_tensor(s[k]), torch.as_tensor(t[k]), atol=2e-5), k
    assert all(p.grad is None for p in b.parameters())

NETS = dict(drop=drop, unused=Unused, tied=Tied, frozen=frozen)
@quiet
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('opt', ['nesterov', 'AdamW'])
@pytest.mark.parametrize('make', NETS.values(), ids=NETS)
def test_nets(make, opt, dtype):
    "Buffers, dropout, weights that nobody asks for, shared and frozen ones"
    c = Count()
    a,b = (train(s, make, OPTS[opt], dtype=dtype, n=48)[0] for s in (train_step,compiled_step(backend=c)))
    same(a, b)
    assert c.n==1

@quiet
@settings(max_examples=8, deadline=None)
@given(lr=st.floats(1e-3, 0.3), momentum=st.sampled_from([0, 0.5, 0.9]), wd=st.sampled_from([0, 1e-3, 0.1]), nesterov=st.booleans(), theirs=st.booleans())
def test_any_sgd(lr, momentum, wd, nesterov, theirs):
    cls = torch.optim.SGD if theirs else SGD
    def opt(ps): return cls(ps, lr=lr, momentum=momentum, weight_decay=wd, nesterov=nesterov and momentum>0)
    a,b = (train(s, opt=opt)[0] for s in (train_step,compiled_step(backend='eager')))
    same(a, b)

@compiler
@quiet
@pytest.mark.parametrize('opt', ['nesterov', 'AdamW'])
def test_inductor(opt):
    "With PyTorch's own compiler; the same seed gives the same run"
    step = compiled_step()
    a,b,c = (train(s, drop, OPTS[opt], sched=True)[0] for s in (train_step,step,step))
    same(a, b)
    assert all(x.equal(y) for x,y in zip(b.state_dict().values(), c.state_dict().values()))

@quiet
def test_two_inputs_and_a_loss_with_a_buffer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6,3)
        def forward(self, x, k): return self.a(x)*k
    ds = [(torch.randn(8,6), torch.rand(8,1), torch.randint(3,(8,))) for _ in range(3)]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.,2,3]))
    a,b = (train(s, Two, dl=ds, loss=loss)[0] for s in (train_step,compiled_step(backend='eager')))
    same(a, b)

@quiet
def test_what_changes_between_epochs_is_noticed():
    "A number in a closure, a layer's mode, what is frozen, another optimizer's setting"
    class Change(Callback):
        def before_epoch(self, run):
            self.epoch = run.epoch
            box[0] = 1.+run.epoch
            run.model[3].p = 0.3 if run.epoch<2 else 0.
            run.model[0].weight.requires_grad_(run.epoch!=1)
            for g in run.opt.param_groups: g['weight_decay'] = 0.1*run.epoch
    box = [1.]
    def loss(p, y): return cross_entropy(p, y)*box[0]
    def freeze(): m = drop(); return m
    a,b = (train(s, freeze, OPTS['theirs'], epochs=4, cbs=[Change()], loss=loss)[0] for s in (train_step,compiled_step(backend='eager')))
    same(a, b)

@quiet
def test_weights_loaded_or_moved_between_runs():
    step,m = compiled_step(backend='eager'),net()
    e = copy.deepcopy(m)
    for change in (lambda n: None, lambda n: n.load_state_dict({k:v*0.5 for k,v in n.state_dict().items()}), lambda n: n.double()):
        for n,s in ((m,step),(e,train_step)):
            change(n)
            torch.manual_seed(0)
            fit(1, n, cross_entropy, SGD(n.parameters(), lr=0.1), DataLoader(data(32, n[0].weight.dtype), 16), progress=False, step=s)
    same(m, e)

@quiet
def test_many_models_do_not_use_up_each_others_graphs():
    "PyTorch compiles a function eight times at most: that is per model here"
    c = Count()
    for k in range(10): train(compiled_step(backend=c), lambda: nn.Sequential(nn.Linear(6,4+k), nn.ReLU(), nn.Linear(4+k,3)), n=32)
    assert c.n==10

@quiet
def test_goes_on_from_the_optimizers_state_and_back():
    "Eager, compiled and eager again is one run"
    def run(steps):
        torch.manual_seed(1)
        m = net(); o = SGD(m.parameters(), lr=0.1, momentum=0.9)
        for s in steps: fit(1, m, cross_entropy, o, DataLoader(data(), 16), progress=False, step=s)
        return m
    c = compiled_step(backend='eager')
    same(run([train_step]*4), run([train_step,c,c,train_step]))

@quiet
def test_resumes_from_a_checkpoint(tmp_path):
    "The eager first batch after a start computes the same, to rounding"
    def run(path, epochs): return train(compiled_step(backend='eager'), drop, OPTS['nesterov'], epochs=epochs, cbs=[Checkpoint(path)])[0]
    whole = run(tmp_path/'a', 4)
    run(tmp_path/'b', 2)
    same(whole, run(tmp_path/'b', 4))

def eager(why, step=None, **kw):
    "Training goes on as with `train_step`, and one warning says why"
    step = step or compiled_step(backend='eager')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        b = train(step, **kw)[0]
    said = [str(w.message) for w in said if 'compiled_step' in str(w.message)]
    assert len(said)==1 and why in said[0], said
    same(train(train_step, **kw)[0], b)

class Numpy(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(6,3)
    def forward(self, x):
        y = self.l(x)
        return y*(2. if y.detach().sum().item()>0 else 1.)       # an `if` on a value

def test_says_once_why_it_is_eager():
    eager('callback', cbs=[ClipGrad(0.1)])
    eager('callback', cbs=[Accumulate(2)])
    eager('', make=Numpy)
    eager('', make=momentumless)                 # reads a count of batches
    def broken(gm, inputs): raise RuntimeError('no compiler here')
    eager('no compiler here', compiled_step(backend=broken))

def test_a_penalty_on_weights_that_do_not_come_through_the_model():
    def run(step):
        torch.manual_seed(0)
        m = net()
        def loss(p, y): return cross_entropy(p, y)+1e-3*m[0].weight.pow(2).sum()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            fit(2, m, loss, SGD(m.parameters(), lr=0.1), DataLoader(data(), 16), progress=False, step=step)
        return m
    with pytest.warns(UserWarning, match='do not come through the model'):
        torch.manual_seed(0); m = net()
        fit(1, m, lambda p,y: cross_entropy(p, y)+1e-3*m[0].weight.pow(2).sum(), SGD(m.parameters(), lr=0.1), DataLoader(data(), 16), progress=False,
            step=compiled_step(backend='eager'))
    same(run(train_step), run(compiled_step(backend='eager')))

def test_a_parameter_of_the_loss_is_trained_eagerly():
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.s = nn.Parameter(torch.ones(()))
        def forward(self, p, y): return cross_entropy(p*self.s, y)
    def run(step):
        torch.manual_seed(0)
        m,loss = net(),Scaled()
        fit(1, m, loss, SGD([*m.parameters(), *loss.parameters()], lr=0.1), DataLoader(data(), 16), progress=False, step=step)
        return m
    with pytest.warns(UserWarning, match='more than the parameters'): b = run(compiled_step(backend='eager'))
    same(run(train_step), b)

def test_errors_are_those_of_the_eager_step():
    bad = [(torch.randn(4,6), torch.randint(3,(4,))), (torch.randn(4,5), torch.randint(3,(4,)))]
    for dl in (bad, bad[::-1]):
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
            warnings.simplefilter('ignore')
            train(compiled_step(backend='eager'), dl=dl)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cuda():
    from torch._dynamo.utils import counters
    def run(step):
        torch.manual_seed(1)
        m = net().cuda(); o = SGD(m.parameters(), lr=0.1, momentum=0.9)
        fit(3, m, cross_entropy, o, DataLoader(data(), 16), progress=False, step=step)
        return m
    counters['inductor'].clear()              # a step that cannot be a CUDA graph is counted as skipped
    same(run(train_step), run(compiled_step()), tol=1e-4)
    assert not counters['inductor']['cudagraph_skips']

class Once(Callback):
    "Calls f(run) after batch `n`, and only then"
    def __init__(self, f, n=2): self.f,self.n = f,n
    def after_batch(self, run):
        if (run.epoch,run.batch)==(0,self.n): self.f(run)

def replaced(run): run.model[2].weight = nn.Parameter(run.model[2].weight.detach()*0.5)
CHANGES = dict(freeze=lambda run: run.model[0].requires_grad_(False), thaw=lambda run: run.model[2].requires_grad_(True),
               loss=lambda run: setattr(run, 'loss_func', lambda p,y: cross_entropy(p, y)*0.5), memory=lambda run: setattr(run.model[0].weight, 'data', run.model[0].weight.data*0.5),
               group=lambda run: run.opt.add_param_group(dict(params=[*run.model[0].parameters()], lr=0.05)))

@quiet
@pytest.mark.parametrize('change', CHANGES)
def test_what_changes_between_batches_is_noticed(change):
    def run(step):
        torch.manual_seed(1)
        m = net()
        if change=='thaw': m[2].requires_grad_(False)
        ps = m[2].parameters() if change=='group' else m.parameters()
        f = fit(2, m, cross_entropy, SGD(ps, lr=0.1, momentum=0.9), DataLoader(data(), 10), cbs=Once(CHANGES[change]), progress=False, step=step)
        return m,f
    (a,fa),(b,fb) = run(train_step),run(compiled_step(backend='eager'))
    same(a, b)
    assert fa==pytest.approx(fb, abs=1e-5)

class Clamp(Callback):
    def after_batch(self, run):
        for p in run.model.parameters(): p.data = p.data.clamp(-.3,.3)

def test_weights_elsewhere_after_every_batch():
    eager('change them by copy_', cbs=[Clamp()], epochs=4)

def test_a_parameter_replaced_between_batches():
    eager('trains more than the parameters', cbs=[Once(replaced)])       # the optimizer still holds the old one

class Centred(nn.Module):
    "Puts new tensors in the place of its buffers"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6,3)
        self.register_buffer('mean', torch.zeros(6)); self.register_buffer('n', torch.tensor(0))
    def forward(self, x):
        if self.training: self.mean,self.n = .9*self.mean+.1*x.mean(0),self.n+1
        return self.l(x-self.mean)
class Counted(nn.Module):
    "Counts its calls in an attribute, and computes with it"
    def __init__(self): super().__init__(); self.l,self.n = nn.Linear(6,3),torch.zeros(())
    def forward(self, x):
        if self.training: self.n = self.n+1
        return self.l(x)*(1+0.1*self.n)

def test_forward_that_changes_more_than_weights():
    eager('in place of buffers', make=Centred)
    for make in (Centred,Counted):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            a,b = (train(s, make, epochs=3)[0] for s in (train_step,compiled_step(backend='eager')))
        assert a.n==b.n==12
        same(a, b)
