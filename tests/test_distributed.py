"Several processes train what one process trains; and wrong use is an error in all of them, never a hang"
import functools, math, os, random, re, signal, subprocess, sys, threading, time, warnings
from pathlib import Path
import numpy as np, pytest, torch, torch.distributed as dist, torch.multiprocessing as mp, torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
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

class OwnNoise(Noisy):
    "With a generator of its own"
    def __init__(self, dtype): super().__init__(dtype); self.g = torch.Generator().manual_seed(3)
    def __getitem__(self, i): return self.x[i]+torch.randn(6, generator=self.g),self.y[i]

class Odd(Noisy):
    "Rows whose numbers lie apart, and objects that are others in each process"
    def __getitem__(self, i): return self.x.T.contiguous().T[i],self.y[i],np.array([object()])

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

def ignoring(preds, yb):
    mask = (yb>=0).to(preds)
    return (F.cross_entropy(preds, yb.clamp(0), reduction='none')*mask).sum()/mask.sum()

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
    elif name=='best': add(Best('right'), epochs=5, opt=dict(lr=0.3))
    elif name=='amp': add(AMP())
    elif name=='amp, half': add(AMP(torch.float16), ClipGrad(0.5))
    elif name=='schedule': sched = lambda opt: Schedule(L.OneCycleLR(opt, 0.5, total_steps=27))
    elif name=='plateau': sched = lambda opt: Schedule(L.ReduceLROnPlateau(opt, patience=0), per='epoch')
    elif name=='no validation': add(valid_dl=None)
    elif name=='whole': add(metrics=(whole(f1),right,whole(in_order)))
    elif name=='count': add(train_dl=masked(dtype), valid_dl=masked(dtype), loss_func=ignoring, count=labelled, metrics=())
    elif name=='count, ours': add(count=lambda yb: (yb+1).sum(), loss_func=functools.partial(F.cross_entropy, weight=torch.arange(1,4).to(dtype)), metrics=())
    elif name=='workers': add(**dls(dtype, num_workers=1, multiprocessing_context='fork'), epochs=1)
    elif name=='noise': add(train_dl=DataLoader(Noisy(dtype), 8, shuffle=True))
    elif name=='noise in validation': add(valid_dl=DataLoader(Noisy(dtype), 7))
    elif name=='workers with noise in validation': add(valid_dl=DataLoader(Noisy(dtype), 7, num_workers=1, multiprocessing_context='fork'), epochs=1)
    elif name=='own noise in validation': add(valid_dl=DataLoader(OwnNoise(dtype), 7))
    elif name=='odd tensors': add(train_dl=DataLoader(Odd(dtype), 8, collate_fn=lambda rows: tuple(map(torch.stack, zip(*[r[:2] for r in rows])))))
    elif name=='transform': add(**dls(dtype, transform=lambda b: (b[0]+torch.rand_like(b[0]),b[1])))
    elif name=='theirs': add(**dls(dtype, Dl=TheirDl))
    elif name=='their workers': add(**dls(dtype, Dl=TheirDl, num_workers=1, multiprocessing_context='fork'), epochs=1)
    elif name=='list': add(train_dl=[*dls(dtype)['train_dl']], valid_dl=[*dls(dtype)['valid_dl']])
    elif name=='stream': add(train_dl=Stream(dtype), valid_dl=Stream(dtype))
    elif name=='small batches': add(**dls(dtype, bs=1, n=20))
    elif name=='one batch to validate': add(valid_dl=[data(30, 5, dtype)])
    elif name=='dict': add(model=Named().to(dtype), train_dl=NamedDl(dtype), valid_dl=NamedDl(dtype), opt=dict(weight_decay=0.1))
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

def difference(a, b):
    if isinstance(a, dict): assert a.keys()==b.keys(); return max(difference(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): assert len(a)==len(b), (a,b); return max(map(difference, a, b), default=0.)
    return torch.as_tensor(a, dtype=torch.float64).sub(torch.as_tensor(b, dtype=torch.float64)).abs().max().item()

# The processes: they wait for functions of this module to call

def serve(rank, world, port, pipe, timeout):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE='True')
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    join_group(timeout)
    while (job := pipe.recv()) is not None:
        f,args = job
        try: pipe.send((True, f(*args)))
        except BaseException as e: pipe.send((False, f'{type(e).__name__}: {e}'))

class Group:
    "Some processes that have joined, as under torchrun"
    def __init__(self, world, timeout=60):
        ctx,self.store = mp.get_context('spawn'),dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)    # as torchrun keeps it
        self.pipes,theirs = zip(*[ctx.Pipe() for _ in range(world)])
        self.procs = [ctx.Process(target=serve, args=(r,world,self.store.port,p,timeout), daemon=False) for r,p in enumerate(theirs)]
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
         'workers','noise','noise in validation','workers with noise in validation','own noise in validation','odd tensors','transform','theirs','their workers','list','stream','small batches','one batch to validate','dict','own loss',
         'ddp','ddp, accumulate','ddp, own loss']

@pytest.mark.parametrize('name', CASES)
def test_as_one_process(groups, name, record_property):
    for dtype,eps in (torch.float64,1e-12),(torch.float32,1e-2 if 'amp' in name else 2e-5):
        if ('workers' in name or 'noise in' in name) and dtype==torch.float32: continue       # double precision tells it all
        want = outcome(name, dtype)
        for n,group in groups.items():
            got = group(outcome, name, dtype)
            for g in got[1:]: assert difference(g, got[0])==0             # the processes agree to the last bit
            d = difference(got[0], want)
            record_property(f'{name} {n} {dtype}', d)
            if os.environ.get('SHOW'): print(f'{name:22} {n} {str(dtype)[6:]} {d:.1e}')
            assert d<eps

def finder():
    "The finder's curve, and that it leaves everything as it was"
    a = case('plain', torch.float64)
    before,f = [p.detach().clone() for p in a['model'].parameters()],LRFinder(steps=30)
    fit(1, cbs=[f, Distributed()], progress=False, **{k:v for k,v in a.items() if k not in ('epochs','cbs')})
    assert all(p.equal(b) for p,b in zip(a['model'].parameters(), before))
    return dict(lrs=f.lrs, losses=f.losses, next=torch.rand(2))

def test_lr_finder(groups):
    want = finder()
    assert len(want['losses'])>10
    for group in groups.values():
        for got in group(finder): assert difference(got, want)<1e-9

class Draw(Callback):
    "Random numbers within the training step"
    def __init__(self): self.drawn = []
    def before_backward(self, run): self.drawn.append(torch.rand(2).tolist())

def draws(dropout):
    torch.manual_seed(7)
    d,model = Draw(),net(extra=[nn.Dropout(dropout)])
    fit(2, model, F.cross_entropy, SGD(model.parameters(), lr=0.1), **dls(torch.float32), cbs=[d, Distributed()], progress=False)
    return d.drawn,torch.rand(2)

def test_each_process_drops_others_but_draws_the_same_order(groups):
    (a,after),(b,same) = groups[2](draws, 0.5)
    assert not [x for x in a if x in b] and len({*map(str, a)})==len(a)
    assert after.equal(same)

def turns(dl):
    "How many batches of validation this process has looked at, beside the trial at the start"
    calls = []
    def metric(preds, yb): calls.append(len(yb)); return 0.
    model = net()
    fit(1, model, F.cross_entropy, SGD(model.parameters(), lr=0.1), **dls(torch.float32) | (dict(valid_dl=[data(7)]*5) if dl=='list' else {}),
        metrics=metric, cbs=Distributed(), progress=False)
    return len(calls)-1

@pytest.mark.parametrize('dl', ['ours','list'])
def test_validation_is_dealt_out(groups, dl): assert sorted(groups[2](turns, dl))==[2,3]

class Seen(Callback):
    "The inputs of the batches"
    def __init__(self): self.rows = []
    def before_batch(self, run): self.rows.append(run.xb[0].clone())

class Drawn(torch.utils.data.Dataset):
    def __len__(self): return 16
    def __getitem__(self, i): return torch.rand(6),i%3

def worker_draws():
    torch.manual_seed(7)
    s,model = Seen(),net()
    dl = DataLoader(Drawn(), 8, num_workers=1, multiprocessing_context='fork')
    fit(1, model, F.cross_entropy, SGD(model.parameters(), lr=0.1), dl, cbs=[s, Distributed()], progress=False)
    return s.rows

def test_workers_of_other_processes_draw_other_numbers(groups):
    a,b = groups[2](worker_draws)
    assert len(a)==2 and all(len(x)==len(y)==4 and not x.equal(y) for x,y in zip(a,b))

def batchnorm(valid):
    torch.manual_seed(7)
    model = net(extra=[nn.BatchNorm1d(8)])
    before = model[1].running_mean.clone()
    fit(2, model, F.cross_entropy, SGD(model.parameters(), lr=0.1), **dls(torch.float32) | ({} if valid else dict(valid_dl=None)), cbs=Distributed(), progress=False)
    assert not model[1].running_mean.equal(before)
    return torch.cat([t.reshape(-1).double() for t in model.state_dict().values()])

@pytest.mark.parametrize('valid', [True,False])
def test_running_means_are_those_of_process_0(groups, valid):
    a,b,c = groups[3](batchnorm, valid)
    assert a.equal(b) and a.equal(c)

def reductions(n, ddp):
    "How many sums of gradients there were, by hand and by DDP, in 9 batches"
    import minibatch.distributed as D
    seen,sums = [0,0],D._sum_grads
    def counted(ps): seen[0] += 1; sums(ps)
    def hook(state, bucket): seen[1] += bucket.is_last(); return default_hooks.allreduce_hook(None, bucket)
    model = net()
    if ddp: model = DDP(model); model.register_comm_hook(None, hook)
    D._sum_grads = counted
    try: fit(1, model, F.cross_entropy, SGD(model.parameters(), lr=0.1), **dls(torch.float32), cbs=[Distributed(), *[Accumulate(n)]*(n>1)], progress=False)
    finally: D._sum_grads = sums
    return seen

def test_gradients_are_summed_once_for_an_update(groups):
    group = groups[2]
    assert group(reductions, 1, False)[0]==[9,0] and group(reductions, 4, False)[0]==[3,0]
    assert group(reductions, 1, True)[0]==[0,9] and group(reductions, 4, True)[0]==[3,0]

def compiled():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model = net()
        fit(1, model, F.cross_entropy, SGD(model.parameters(), lr=0.1), **dls(torch.float32), cbs=Distributed(), progress=False, step=compiled_step(backend='eager'))
    return [str(w.message) for w in said if 'compiled_step' in str(w.message)]

def test_compiled_step_is_eager_and_says_so_but_not_in_one_process(groups):
    for said in groups[2](compiled): assert len(said)==1 and 'acts around backward' in said[0]
    assert compiled()==[]

def shared(): return share(lambda rank: [rank, torch.ones(2)], dist.get_rank())[0]
def failing(): return share(lambda: 1/0)
class TwoWords(Exception):
    "Cannot be unpickled"
    def __init__(self, a, b): super().__init__(f'{a} and {b}')
def odd_error():
    def f(): raise TwoWords('this', 'that')
    share(f)
def odd_result(): return share(lambda: threading.Lock())

def test_share(groups):
    assert groups[3](shared)==[0,0,0]
    assert [a for _,a in groups[3].answers(failing)]==['ZeroDivisionError: division by zero']*3
    assert [a for _,a in groups[3].answers(odd_error)]==['RuntimeError: TwoWords: this and that']*3
    assert all('pickle' in a for _,a in groups[3].answers(odd_result)) and groups[3](shared)==[0,0,0]

# Wrong use: one clear error in all processes. Each of these functions trains something that cannot be right

def train(model=None, cbs=(), epochs=2, **kw):
    torch.manual_seed(7)
    model = model or net()
    a = dict(model=model, loss_func=F.cross_entropy, opt=SGD(model.parameters(), lr=0.1), progress=False, cbs=[*cbs, Distributed()])
    return fit(epochs, **a | dls(torch.float32) | kw)

def sampler(valid):
    ds = TensorDataset(*data())
    dl = TheirDl(ds, 8, sampler=torch.utils.data.DistributedSampler(ds))
    train(**{'valid_dl' if valid else 'train_dl':dl})
def other_weights(): torch.manual_seed(dist.get_rank()); train(model=net())
def other_data(valid): train(**{'valid_dl' if valid else 'train_dl':DataLoader(TensorDataset(*data(seed=dist.get_rank())), 8)})
def own_rows():
    r = dist.get_rank()
    train(train_dl=DataLoader(TensorDataset(*(t[r::2] for t in data())), 8))
def other_metrics(): train(metrics=[right,f1][dist.get_rank()])
def other_epochs(): train(epochs=2+dist.get_rank())
def other_callbacks(): train(cbs=[ClipGrad(1.)] if dist.get_rank() else [])
def other_momentum():
    torch.manual_seed(7)
    model = net()
    train(model=model, opt=SGD(model.parameters(), lr=0.1, momentum=0.5*dist.get_rank()))
def per_batch(): train(count=lambda yb: 1)
def without_hooks(run):
    run.preds,run.update = run.model(*run.xb),True
    run.loss = run.loss_func(run.preds, run.yb)
    run.loss.backward()
    run.opt.step()
def own_step(): train(step=without_hooks)
def doubled(rows): return tuple(torch.stack([t for r in rows for t in [r[k]]*2]) for k in (0,1))
def more_rows(): train(train_dl=DataLoader(TensorDataset(*data()), 8, collate_fn=doubled, num_workers=1, multiprocessing_context='fork'))
def no_rows(): train(train_dl=[(torch.ones(3,6),torch.zeros(3,dtype=torch.int64),torch.zeros(2))], valid_dl=None, loss_func=lambda p,y: p.sum())
def not_finite():
    x,y = data()
    x[3] = math.nan                     # in the part of one of them
    train(train_dl=DataLoader(TensorDataset(x,y), 70, shuffle=False))

class Longer:
    "An epoch that is longer in one process"
    def __init__(self, more): self.more = more
    def __iter__(self): return iter([data(8)]*(5+self.more))
def unequal(): train(train_dl=Longer(dist.get_rank()))
def nothing(): train(train_dl=Longer(-5*dist.get_rank()))

WRONG = [
    (sampler, (False,), 'DistributedSampler in the loader: leave it out'), (sampler, (True,), 'DistributedSampler in the loader: leave it out'),
    (other_weights, (), 'differ in their weights'), (other_data, (False,), 'differ in their training data'),
    (other_data, (True,), 'differ in their validation data'), (own_rows, (), 'differ in their training data'),
    (other_metrics, (), 'differ in their table'), (other_epochs, (), 'differ in their epochs'), (other_callbacks, (), 'differ in their callbacks'),
    (other_momentum, (), 'differ in their optimizer'), (per_batch, (), 'count gives 2 times as much for the parts'),
    (own_step, (), 'has called no run.before_backward'), (more_rows, (), 'collate_fn has made 8 rows of 4 examples'), (no_rows, (), 'expected tensors of the same length'),
    (not_finite, (), 'The loss is nan in epoch 1, batch 1')]

@pytest.mark.parametrize('f,args,message', WRONG, ids=lambda v: getattr(v,'__name__',''))
def test_wrong_use_is_an_error_in_all(groups, f, args, message):
    for ok,e in groups[2].answers(f, *args): assert not ok and message in e, e
    assert len(groups[2](train))==2                    # and they are still in step

def test_unequal_epochs(groups):
    a,b = (e for _,e in groups[2].answers(unequal))
    assert 'process 0 has no more batches in epoch 1 after 5' in a and 'process 1 has more batches in epoch 1 after 5' in b

class On(Callback):
    "Does something in one process, in the middle of epoch 2"
    def __init__(self, rank, f): self.rank,self.f = rank,f
    def after_batch(self, run):
        if (dist.get_rank() if dist.is_initialized() else 0,run.epoch,run.batch)==(self.rank,1,3): self.f(run)

def raising(rank): train(cbs=[On(rank, lambda run: 1/0)])
def ctrl_c(rank): train(cbs=[On(rank, lambda run: signal.raise_signal(signal.SIGINT))])
def killed(rank): train(cbs=[On(rank, lambda run: os.kill(os.getpid(), signal.SIGKILL))])
def hanging(rank): train(cbs=[On(rank, lambda run: threading.Event().wait(30))])
def ends_itself(f, rank):
    "As a script does that fails: the process ends"
    try: f(rank)
    except BaseException as e:
        if dist.get_rank()==rank: print(type(e).__name__, file=sys.stderr); os._exit(1)
        raise

@pytest.mark.parametrize('rank', [0,1])
@pytest.mark.parametrize('f,message', [(raising,'ZeroDivisionError'), (ctrl_c,'KeyboardInterrupt'), (killed,'another one was killed, hangs')])
def test_when_one_ends_the_other_says_so(pair, f, message, rank):
    for p in pair.pipes: p.send((ends_itself, (f,rank)))
    other = pair.pipes[1-rank]
    assert other.poll(30), 'it hangs'
    ok,e = other.recv()
    assert not ok and message in e and f'process {1-rank} cannot go on' in e, e
    if f is not killed: assert f'process {rank} has failed (' in e

def test_when_one_hangs_the_other_ends_after_the_timeout():
    pair = Group(2, timeout=2)
    try:
        for p in pair.pipes: p.send((hanging, (1,)))
        assert pair.pipes[0].poll(20), 'it hangs, too'
        ok,e = pair.pipes[0].recv()
        assert not ok and 'process 0 cannot go on: another one was killed, hangs' in e, e
    finally:
        for p in pair.procs: p.kill()
        pair.close()

def test_who_comes_too_late(tmp_path, bare):
    (tmp_path/'program.py').write_text('import os, threading\nfrom minibatch.distributed import join_group\n'
                                       'if os.environ["RANK"]=="1": threading.Event().wait(60)\njoin_group(timeout=2)')
    p = torchrun('program.py', cwd=tmp_path)
    assert p.returncode and 'process 0 of 2 has waited in vain for the others: each should call join_group() within 2 seconds' in p.stderr, p.stderr[-3000:]

def one_stops(rank):
    h = History()
    def stop(run): run.stop = True
    train(cbs=[h, On(rank, stop)], epochs=4)
    return len(h.rows)

@pytest.mark.parametrize('rank', [0,1])
def test_one_stops_all_stop(groups, rank): assert groups[2](one_stops, rank)==[1,1]

def one_lr(rank):
    def change(run): run.opt.param_groups[0]['lr'] = 0.5
    lrs = []
    class Note(Callback):
        def after_epoch(self, run): lrs.append(run.lr)
    train(cbs=[Note(), On(rank, change)], epochs=3)
    return lrs

def test_the_learning_rate_is_that_of_process_0(groups):
    assert groups[2](one_lr, 0)==[[0.1,0.5,0.5],[0.1,0.1,0.5]] and groups[2](one_lr, 1)==[[0.1,0.1,0.1],[0.1,0.5,0.1]]

def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(RuntimeError, match=r'process 2 of this machine finds 1 GPU\(s\).*CUDA_VISIBLE_DEVICES='): join_group()

def test_without_join_group_it_is_an_error(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(RuntimeError, match=r'call join_group\(\) at the beginning'): train()

# Checkpoints

def checkpointed(path, at=None, epochs=4, **kw):
    "Weights and table of a run with a checkpoint; it may stop in mid-epoch, as if it were killed"
    torch.manual_seed(7)
    h,model = History(),net(torch.float64, [nn.Dropout(kw.get('drop', 0.))])
    opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
    def stop(run): raise KeyboardInterrupt
    cbs = [h, Accumulate(2), *[On(at, stop)]*(at is not None), Checkpoint(path, every=2)]
    if at=='all': cbs[2] = On(dist.get_rank() if dist.is_initialized() else 0, stop)
    try: fit(epochs, model, F.cross_entropy, opt, **dls(torch.float64), metrics=right, cbs=[*cbs, Distributed()], progress=False)
    except KeyboardInterrupt: return
    rows = [[v for k,v in r.items() if k!='seconds'] for r in h.rows]
    return dict(rows=rows, weights=torch.cat([p.detach().reshape(-1) for p in model.parameters()]))

@pytest.mark.parametrize('drop', [0.,0.3])
def test_a_checkpoint_goes_on_with_the_same_bits(groups, tmp_path, drop):
    group = groups[2]
    job = functools.partial(checkpointed, drop=drop)
    want = group(job, tmp_path/'whole')
    assert group(job, tmp_path/'c', 'all')==[None,None] and (tmp_path/'c').exists()
    for got,w in zip(group(job, tmp_path/'c'), want): assert difference(got, w)==0

@pytest.mark.parametrize('before,after', [(2,1),(1,3),(3,2)])
def test_a_checkpoint_of_another_number_of_processes(groups, tmp_path, before, after):
    want = checkpointed(tmp_path/'whole')
    def run(n, *args): return groups[n](checkpointed, *args) if n>1 else [checkpointed(*args)]
    assert run(before, tmp_path/'c', 'all')==[None]*before and (tmp_path/'c').exists()
    for got in run(after, tmp_path/'c'): assert difference(got, want)<1e-12

def test_process_0_reads_the_checkpoint_for_all(groups, tmp_path):
    path = [tmp_path/'a', tmp_path/'nobody has this']
    want = groups[2](two_paths, path)
    assert groups[2](two_paths, path)==want and not path[1].exists()
    path[0].write_bytes(path[0].read_bytes()[:1000])
    for ok,e in groups[2].answers(two_paths, path): assert not ok and 'damaged' in e
def two_paths(paths): return checkpointed(paths[dist.get_rank()])['weights'].tolist()

# Programs under torchrun

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--monitor-interval=0.1']
def torchrun(*args, n=2, cwd, env=os.environ, **kw):
    return subprocess.run([*TORCHRUN, '--standalone', f'--nproc-per-node={n}', *map(str, args)], cwd=cwd, capture_output=True, text=True, env=env, timeout=120, **kw)

PROGRAM = """
import os, sys, torch, torch.nn.functional as F
from minibatch.all import *
from minibatch.distributed import Distributed, join_group
device = join_group(timeout=30)
model = mlp(784, 20, 10)                 # no seed: process 0 draws for all
x,y,xv,yv = get_data('digits')
fit(4, model, F.cross_entropy, SGD(model.parameters(), lr=0.1, momentum=0.9), *get_dls(Dataset(x[:700],y[:700]), Dataset(xv,yv), 32),
    cbs=[Distributed()])
print('done')
"""

def test_a_program_without_a_seed_has_one_voice(tmp_path, bare):
    (tmp_path/'program.py').write_text(PROGRAM)
    p = torchrun('program.py', cwd=tmp_path)
    assert p.returncode==0, p.stderr
    assert p.stdout.count('train_loss')==1 and p.stdout.count('done')==1

def test_the_command_under_torchrun(tmp_path, bare):
    args = '-m', 'minibatch', '--epochs', '2', '--bs', '100', '--out'
    p,one = torchrun(*args, 'two', cwd=tmp_path),subprocess.run([sys.executable, *args, 'one'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode==one.returncode==0, p.stderr
    strip = [re.sub(r'\S+$', '', l) for l in p.stdout.splitlines()[1:4]],[re.sub(r'\S+$', '', l) for l in one.stdout.splitlines()[1:4]]
    assert strip[0]==strip[1]                                                       # the table, but for the seconds
    a,b = (torch.load(tmp_path/f/'model.pt', weights_only=True) for f in ('one','two'))
    for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=0)
    assert {f.name for f in (tmp_path/'one').iterdir()}=={f.name for f in (tmp_path/'two').iterdir()}
    p = torchrun(*args, 'two', '--resume', cwd=tmp_path)
    assert p.returncode==0 and 'finished; nothing is left to do' in p.stdout

KILLED = """
import os, sys, torch, torch.nn.functional as F
from minibatch.all import *
from minibatch.distributed import Distributed, join_group, share
from torch import nn
from torch.utils.data import TensorDataset
join_group(timeout=8 if 'cut' in sys.argv else 20)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8,3))
g = torch.Generator().manual_seed(0)
x,y = torch.randn(70, 6, generator=g),torch.randint(0, 3, (70,), generator=g)
class Bomb(Callback):
    order = 300
    def after_batch(self, run):
        at = run.epoch,run.batch,int(os.environ['RANK']),int(os.environ['TORCHELASTIC_RESTART_COUNT'])
        if at==(1,5,1,0) and 'bomb' in sys.argv: os.kill(os.getpid(), 9)
        if 'slow' in sys.argv: os.write(2, b'<%d>\\n' % os.getpid())       # in one piece, as the other process writes, too
fit(20 if 'slow' in sys.argv else 4, model, F.cross_entropy, SGD(model.parameters(), lr=0.1, momentum=0.9), DataLoader(TensorDataset(x,y), 8, shuffle=True),
    cbs=[Bomb(), Accumulate(2), Checkpoint('c', every=2), Distributed()], progress=False)
share(torch.save, model.state_dict(), 'final.pt')
"""

def final(folder): return torch.load(folder/'final.pt', weights_only=True)
def run_in(folder, *args, **kw):
    folder.mkdir(exist_ok=True)
    (folder/'program.py').write_text(KILLED)
    p = torchrun('--max-restarts=1', 'program.py', *args, cwd=folder, **kw)
    assert p.returncode==0, p.stderr
    return p

def test_a_killed_worker_changes_nothing(tmp_path, bare):
    run_in(tmp_path/'whole')
    assert 'going on after 1 epochs and 4 batches' in run_in(tmp_path/'killed', 'bomb').stdout
    a,b = final(tmp_path/'whole'),final(tmp_path/'killed')
    for k in a: assert a[k].equal(b[k])

@pytest.mark.kills
def test_twenty_kills(tmp_path, bare):
    "`pytest -m kills`: SIGKILL of any process at a random moment, every third time twice within a second"
    r = random.Random(0)
    run_in(tmp_path/'whole', 'slow')
    want,ended = final(tmp_path/'whole'),[]
    for i in range(20):
        folder = tmp_path/f'{i}'
        folder.mkdir()
        (folder/'program.py').write_text(KILLED)
        start = [*TORCHRUN, '--standalone', '--nproc-per-node=2', '--max-restarts=3', 'program.py', 'slow']
        with open(folder/'err', 'wb') as err: p = subprocess.Popen(start, cwd=folder, stdout=subprocess.DEVNULL, stderr=err)
        kills = 2 if i%3==0 else 1
        seen,end = 0,time.monotonic()+90
        while p.poll() is None and time.monotonic()<end:
            lines = re.findall(rb'<(\d+)>', (folder/'err').read_bytes())
            if kills and len(lines)>seen+r.randrange(5,150):
                try: os.kill(int(r.choice(lines[-4:])), signal.SIGKILL)
                except ProcessLookupError: pass
                kills,seen = kills-1,len(lines)-100*(kills==2)
                time.sleep(r.random())
            time.sleep(0.01)
        hangs = p.poll() is None
        if hangs: p.kill()
        assert not hangs, (folder/'err').read_text()[-3000:]
        ended.append(p.returncode)
        if p.returncode: run_in(folder, 'slow')             # an error, and a whole checkpoint: a fresh start
        got = final(folder)
        for k in want: assert want[k].equal(got[k]), (i,k)
    print(f'{ended.count(0)} of 20 ended by themselves')

# Two machines: two network namespaces, joined by a cable

def ip(*args): subprocess.run(['ip', *args], check=True, capture_output=True)

@pytest.fixture
def machines():
    names = [f'mb{os.getpid()}{c}' for c in 'ab']
    try:
        try:
            for n in names: ip('netns', 'add', n)
            ip('link', 'add', names[0], 'type', 'veth', 'peer', 'name', names[1])
            for i,n in enumerate(names):
                ip('link', 'set', n, 'netns', n)
                for args in ('addr', 'add', f'10.77.0.{i+1}/24', 'dev', n),('link', 'set', n, 'up'),('link', 'set', 'lo', 'up'): ip('-n', n, *args)
        except (OSError,subprocess.CalledProcessError) as e: pytest.skip(f'no network namespaces may be made here: {getattr(e,"stderr",e)!r:.200}')
        yield names
    finally:
        for n in names: subprocess.run(['ip', 'netns', 'del', n], capture_output=True)

def on_machines(names, folder, *args):
    "One program on both machines, each with a disk of its own"
    procs = []
    for i,n in enumerate(names):
        (folder/n).mkdir()
        (folder/n/'program.py').write_text(KILLED)
        cmd = [*TORCHRUN, '--nnodes=2', '--nproc-per-node=1', f'--node-rank={i}', '--master-addr=10.77.0.1', '--master-port=29512', 'program.py', *args]
        procs.append(subprocess.Popen(['ip', 'netns', 'exec', n, *cmd], cwd=folder/n, stdout=subprocess.PIPE, stderr=open(folder/n/'err', 'wb'),
                                      env=dict(os.environ, GLOO_SOCKET_IFNAME=n, TP_SOCKET_IFNAME=n)))
    return procs

def test_two_machines(machines, tmp_path, bare):
    run_in(tmp_path/'whole')
    procs = on_machines(machines, tmp_path)
    for p,n in zip(procs, machines): assert p.wait(90)==0, (tmp_path/n/'err').read_text()[-3000:]
    a,b = final(tmp_path/'whole'),final(tmp_path/machines[0])
    for k in a: assert a[k].equal(b[k])
    assert not (tmp_path/machines[1]/'final.pt').exists() and not (tmp_path/machines[1]/'c').exists()

def test_a_cut_cable_is_an_error_in_both(machines, tmp_path, bare):
    procs = on_machines(machines, tmp_path, 'slow', 'cut')
    errs = [tmp_path/n/'err' for n in machines]
    while not all(len(re.findall(rb'<\d+>', e.read_bytes()))>20 for e in errs): assert all(p.poll() is None for p in procs); time.sleep(0.02)
    ip('-n', machines[0], 'link', 'set', machines[0], 'down')
    for p,e in zip(procs, errs):
        assert p.wait(90)!=0
        assert 'cannot go on: another one was killed, hangs' in e.read_text(), e.read_text()[-3000:]
