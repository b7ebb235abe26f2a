"Several processes train what one process trains; and wrong use is an error in all of them, never a hang"
import functools, math, os, random, re, shutil, signal, socket, subprocess, sys, threading, time, traceback, warnings
from pathlib import Path
import numpy as np, pytest, torch, torch.distributed as dist, torch.multiprocessing as mp, torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import lr_scheduler as L
from minibatch.all import *
from minibatch.distributed import Distributed, join_group, share

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform=='win32', reason='needs torch.distributed with gloo')

# What is trained: a case gives the arguments of fit, in one process and in several

def data(n=70, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g).to(dtype),torch.randint(0, 3, (n,), generator=g)

def net(dtype=torch.float32, extra=()): return nn.Sequential(nn.Linear(6,8), *extra, nn.ReLU(), nn.Linear(8,3)).to(dtype)
def dls(dtype, bs=8, n=70, Dl=DataLoader, **kw):
    return dict(train_dl=Dl(TensorDataset(*data(n, dtype=dtype)), bs, shuffle=True, **kw), valid_dl=Dl(TensorDataset(*data(31, 5, dtype)), 7))
TensorDataset,TheirDl = torch.utils.data.TensorDataset,torch.utils.data.DataLoader

def right(preds, yb): return (preds.argmax(-1)==yb).double().mean()
def f1(preds, yb):
    said,true = preds.argmax(-1)==1,yb==1
    return 2*(said&true).sum()/(said.sum()+true.sum()).clamp(1)
def in_order(preds, yb): return (preds[:,0]*torch.arange(len(preds))).mean()      # knows where a row stands
def labelled(yb): return (yb>=0).sum()

class Stream:
    "Batches that can only be walked through, of no known length"
    def __init__(self, dtype): self.x,self.y = data(dtype=dtype)
    def __iter__(self):
        for i in torch.randperm(70).split(8): yield self.x[i],self.y[i]

class Noisy(torch.utils.data.Dataset):
    "Draws random numbers while it loads"
    def __init__(self, dtype): self.x,self.y = data(dtype=dtype)
    def __len__(self): return 70
    def __getitem__(self, i): return self.x[i]+0.1*torch.randn(6, dtype=self.x.dtype)+0.1*random.random(),self.y[i]

class Named(nn.Module):
    def __init__(self): super().__init__(); self.net,self.unused,self.frozen = net(),nn.Linear(2,2),nn.Linear(6,6).requires_grad_(False)
    def forward(self, a, b): return self.net(self.frozen(a)+b)
class NamedDl(Stream):
    def __iter__(self): return (dict(a=xb, b=xb*2, y=yb) for xb,yb in super().__iter__())

class Margin(nn.Module):
    "A loss with a weight of its own, that is trained too"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3))
    def forward(self, preds, yb): return F.cross_entropy(preds*self.w, yb)

def masked(dtype):
    "Targets many of which are to be left out: all of them in some batches, and in some parts of a batch"
    x,y = data(64, dtype=dtype)
    y[torch.arange(64)%16<11] = -1
    return [(x[i:i+8],y[i:i+8]) for i in range(0, 64, 8)]

def ignoring(preds, yb): return F.cross_entropy(preds, yb, ignore_index=-1)

def case(name, dtype):
    "Arguments of `fit` for a case, and a function that tells what else should agree"
    torch.manual_seed(7); random.seed(7)
    a = dict(model=net(dtype), loss_func=F.cross_entropy, metrics=(right,), cbs=[], opt={}, epochs=3)
    a |= dls(dtype)
    sched = None
    def add(*cbs, **kw): a['cbs'] += cbs; a.update(kw)
    if name=='accumulate': add(Accumulate(3))
    elif name=='clip': add(ClipGrad(0.05))
    elif name=='accumulate, clip': add(Accumulate(4), ClipGrad(0.05))
    elif name=='early stop': add(EarlyStop(patience=1, restore=True), epochs=30, opt=dict(lr=0.5))
    elif name=='best': add(Best('right'), epochs=5, opt=dict(lr=0.5))
    elif name=='amp': add(AMP())
    elif name=='amp, half': add(AMP(torch.float16), ClipGrad(0.5))
    elif name=='schedule': sched = lambda opt: Schedule(L.OneCycleLR(opt, 0.5, total_steps=27))
    elif name=='plateau': sched = lambda opt: Schedule(L.ReduceLROnPlateau(opt, patience=0), per='epoch')
    elif name=='lr finder': add(LRFinder(steps=30))
    elif name=='no validation': add(valid_dl=None)
    elif name=='whole': add(metrics=(whole(f1),right,whole(in_order)))
    elif name=='count': add(train_dl=masked(dtype), valid_dl=masked(dtype), loss_func=ignoring, count=labelled, metrics=())
    elif name=='count, ours': add(count=lambda yb: (yb+1).sum(), loss_func=functools.partial(F.cross_entropy, weight=torch.arange(1,4).to(dtype)), metrics=())
    elif name=='workers': add(**dls(dtype, num_workers=2))
    elif name=='noise': add(train_dl=DataLoader(Noisy(dtype), 8, shuffle=True))
    elif name=='transform': add(**dls(dtype, transform=lambda b: (b[0]+torch.rand_like(b[0]),b[1])))
    elif name=='theirs': add(**dls(dtype, Dl=TheirDl))
    elif name=='their workers': add(**dls(dtype, Dl=TheirDl, num_workers=2))
    elif name=='list': add(train_dl=[*dls(dtype)['train_dl']], valid_dl=[*dls(dtype)['valid_dl']])
    elif name=='stream': add(train_dl=Stream(dtype), valid_dl=Stream(dtype))
    elif name=='small batches': add(**dls(dtype, bs=1, n=20))
    elif name=='one batch to validate': add(valid_dl=[data(30, 5, dtype)])
    elif name=='dict': add(model=Named().to(dtype), train_dl=NamedDl(dtype), valid_dl=NamedDl(dtype))
    elif name.endswith('own loss'): add(loss_func=Margin().to(dtype))
    elif name not in ('plain','ddp','ddp, accumulate'): raise ValueError(name)
    if name=='ddp, accumulate': add(Accumulate(3))
    if name.startswith('ddp') and dist.is_initialized(): a['model'] = DDP(a['model'])
    loss_func,model = a['loss_func'],a['model']
    ps = [*model.parameters(), *(loss_func.parameters() if isinstance(loss_func, nn.Module) else ())]
    a['opt'] = SGD(ps, **{'lr':0.1, 'momentum':0.9, **a['opt']})
    if sched: a['cbs'].append(sched(a['opt']))
    return a

def outcome(name, dtype):
    "Train a case; all that should not depend on the number of processes"
    a,h = case(name, dtype),History()
    figures = fit(a.pop('epochs'), cbs=[*a.pop('cbs'), h, Distributed()], progress=False, **a)
    rows = [[v for k,v in r.items() if k!='seconds'] for r in h.rows]
    model,lrs = getattr(a['model'],'module',a['model']),[g['lr'] for g in a['opt'].param_groups]
    weights = torch.cat([p.detach().reshape(-1) for g in a['opt'].param_groups for p in g['params']])
    return dict(figures=figures, rows=rows, lrs=lrs, weights=weights.double())

def trace(name, dtype):
    "As `outcome`, with the finder's curve"
    a = case(name, dtype)
    finder = a['cbs'][0]
    fit(1, cbs=[finder, Distributed()], progress=False, **{k:v for k,v in a.items() if k not in ('epochs','cbs')})
    return dict(lrs=finder.lrs, losses=finder.losses, left=torch.cat([p.detach().reshape(-1) for p in a['model'].parameters()]).double())

def difference(a, b):
    if isinstance(a, dict): assert a.keys()==b.keys(); return max(difference(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): assert len(a)==len(b), (a,b); return max(map(difference, a, b), default=0.)
    return torch.as_tensor(a, dtype=torch.float64).sub(torch.as_tensor(b, dtype=torch.float64)).abs().max().item()

# The processes: they wait for functions of this module to call

def serve(rank, world, port, pipe):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    join_group(timeout=60)
    while (job := pipe.recv()) is not None:
        f,args = job
        try: pipe.send((True, f(*args)))
        except BaseException as e: pipe.send((False, f'{type(e).__name__}: {e}'))

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1',0))
        return s.getsockname()[1]

class Group:
    "Some processes that have joined, as under torchrun"
    def __init__(self, world):
        ctx,port = mp.get_context('spawn'),free_port()
        self.pipes,theirs = zip(*[ctx.Pipe() for _ in range(world)])
        self.procs = [ctx.Process(target=serve, args=(r,world,port,p), daemon=False) for r,p in enumerate(theirs)]
        for p in self.procs: p.start()
    def answers(self, f, *args, limit=60):
        "What f(*args) gave in each process: (True, value) or (False, error)"
        for p in self.pipes: p.send((f,args))
        end = time.monotonic()+limit
        for r,p in enumerate(self.pipes): assert p.poll(max(0, end-time.monotonic())), f'process {r} hangs'
        return [p.recv() for p in self.pipes]
    def __call__(self, f, *args):
        answers = self.answers(f, *args)
        assert all(ok for ok,_ in answers), answers
        return [a for _,a in answers]
    def close(self):
        for p in self.pipes:
            try: p.send(None)
            except OSError: pass
        for p in self.procs:
            p.join(10)
            if p.is_alive(): p.kill()

@pytest.fixture(scope='module')
def groups():
    made = {n:Group(n) for n in (2,3)}
    yield made
    for g in made.values(): g.close()

@pytest.fixture
def pair():
    "Two processes that a test may ruin"
    g = Group(2)
    yield g
    g.close()

CASES = ['plain','amp','amp, half','accumulate','clip','accumulate, clip','early stop','best','schedule','plateau','no validation','whole','count','count, ours',
         'workers','noise','transform','theirs','their workers','list','stream','small batches','one batch to validate','dict','own loss',
         'ddp','ddp, accumulate','ddp, own loss']

@pytest.mark.parametrize('name', CASES)
def test_as_one_process(groups, name, record_property):
    for dtype,eps in (torch.float64,1e-12),(torch.float32,3e-5):
        if name=='their workers' and dtype==torch.float32: continue       # workers take a while to start
        want = outcome(name, dtype)
        for n,group in groups.items():
            got = group(outcome, name, dtype)
            for g in got[1:]: assert difference(g, got[0])==0             # the processes agree to the last bit
            d = difference(got[0], want)
            record_property(f'{name} {n} {dtype}', d)
            if os.environ.get('SHOW'): print(f'{name:22} {n} {str(dtype)[6:]} {d:.1e}')
            assert d<eps
