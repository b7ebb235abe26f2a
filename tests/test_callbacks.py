"The callbacks of lesson 8, against PyTorch's own or a loop by hand"
import itertools, copy, math, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim import lr_scheduler as L
from minibatch.callbacks import *
from minibatch.checkpoint import Checkpoint
from minibatch.data import Dataset, DataLoader
from minibatch.optim import SGD
from minibatch.training import *

def data(n=70, n_in=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_in, generator=g),torch.randint(0, 3, (n,), generator=g)

def net(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8,3))

def setup(bs=8, seed=1, n=70, shuffle=True, Opt=SGD, Dl=DataLoader, **kw):
    model = net(seed)
    opt,ds = Opt(model.parameters(), lr=0.1, momentum=0.9),torch.utils.data.TensorDataset(*data(n))
    return model,F.cross_entropy,opt,Dl(ds, bs, shuffle=shuffle, **kw)

def weights(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k],b[k]) for k in a)
quiet = dict(progress=False)

class Each(Callback):
    def __init__(self, f): self.f = f
    def after_batch(self, run): self.f(run)

class Centers(nn.Module):
    "A loss with parameters of its own"
    def __init__(self): super().__init__(); torch.manual_seed(4); self.c = nn.Parameter(torch.randn(3,3))
    def forward(self, p, y): return F.cross_entropy(p@self.c, y)

SCHEDS = [
    lambda o: L.OneCycleLR(o, 0.1, total_steps=99), lambda o: L.CosineAnnealingLR(o, 30), lambda o: L.StepLR(o, 7),
    lambda o: L.LambdaLR(o, lambda i: 1/(1+i)), lambda o: L.CyclicLR(o, .01, .1, 5), lambda o: L.CosineAnnealingWarmRestarts(o, 5),
    lambda o: L.SequentialLR(o, [L.LinearLR(o, total_iters=4), L.ConstantLR(o)], [6])]

@pytest.mark.parametrize('sched', range(len(SCHEDS)))
def test_schedules(sched):
    a = setup()
    fit(3, *a, cbs=Schedule(SCHEDS[sched](a[2])), **quiet)
    model,loss_func,opt,dl = setup()                    # the loop by hand, with the same random numbers
    s = SCHEDS[sched](opt)
    for _ in range(3):
        for xb,yb in dl: loss_func(model(xb), yb).backward(); opt.step(); opt.zero_grad(); s.step()
    assert same(weights(a[0]), weights(model)) and a[2].param_groups[0]['lr']==s.get_last_lr()[0]

def test_schedule_per_epoch():
    args = setup(); s = L.StepLR(args[2], 1, gamma=0.5)
    fit(3, *args, cbs=Schedule(s, 'epoch'), **quiet)
    assert args[2].param_groups[0]['lr']==0.1/8
    for mode,metric,valid in ('min',None,None), ('min',None,[data(20)]), ('max','accuracy',[data(20)]), ('max','train_loss',None):
        args = setup(); s = L.ReduceLROnPlateau(args[2], patience=0, mode=mode, factor=0.5)
        h = History(); fit(5, *args, valid, cbs=[Schedule(s, 'epoch', metric), h], **quiet)
        ref = L.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], 0.1), patience=0, mode=mode, factor=0.5)
        for r in h.rows: ref.step(r[metric or ('valid_loss' if valid else 'train_loss')])
        assert args[2].param_groups[0]['lr']==ref.optimizer.param_groups[0]['lr'] and s.best==ref.best
    with pytest.raises(ValueError, match="metric='accuracy'"): Schedule(L.ReduceLROnPlateau(args[2], mode='max'), 'epoch')
    with pytest.raises(ValueError, match="per='epoch'"): Schedule(L.ReduceLROnPlateau(args[2]))
    with pytest.raises(ValueError, match='StepLR takes no metric'): Schedule(L.StepLR(args[2], 1), 'epoch', 'accuracy')
    seen = []
    with pytest.raises(RuntimeError, match="There is no 'acc' in the table; it will have"):
        fit(1, *args, cbs=[Schedule(L.ReduceLROnPlateau(args[2]), 'epoch', 'acc'), Each(lambda run: seen.append(1))], **quiet)
    assert not seen                                     # before the first batch
    s = L.StepLR(args[2], 1)
    with pytest.raises(ValueError, match="per is 'step'"): Schedule(s, 'step')
    with pytest.raises(RuntimeError, match='another optimizer'): fit(1, *setup(), cbs=Schedule(s), **quiet)
    with warnings.catch_warnings():                     # stepped only after updates, so that PyTorch has nothing to warn of
        warnings.simplefilter('error')
        args = setup(Opt=torch.optim.SGD); fit(1, *args, cbs=[Schedule(L.StepLR(args[2], 1)), Accumulate(4)], **quiet)
    assert args[2].param_groups[0]['lr']==pytest.approx(0.1*0.1**3)

@settings(max_examples=30, deadline=None)
@given(st.integers(1,60), st.integers(1,9), st.integers(1,5), st.booleans())
def test_accumulate(n, bs, k, clip):
    def go(bs, cbs):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(6,5), nn.Tanh(), nn.Linear(5,3)).double()
        x,y = data(n)
        fit(2, m, F.cross_entropy, SGD(m.parameters(), .3, momentum=.9), DataLoader(Dataset(x.double(),y), bs),
            cbs=[*cbs, ClipGrad(.1)] if clip else cbs, **quiet)
        return nn.utils.parameters_to_vector(m.parameters())
    assert torch.allclose(go(bs, [Accumulate(k)]), go(bs*k, []), atol=1e-12)

def test_clip():
    x,y = data(30)
    for norm in .01,.5,1e9:
        a,b = nn.Linear(6,3),nn.Linear(6,3); b.load_state_dict(a.state_dict())
        fit(1, a, F.cross_entropy, SGD(a.parameters(), 1.), [(x,y)], cbs=ClipGrad(norm), **quiet)
        F.cross_entropy(b(x),y).backward(); nn.utils.clip_grad_norm_(b.parameters(), norm); torch.optim.SGD(b.parameters(), 1.).step()
        assert torch.allclose(a.weight, b.weight) and torch.allclose(a.bias, b.bias)

def test_parameters_beside_the_model():
    m,loss = nn.Linear(6,3),Centers(); was = loss.c.detach().clone()
    fit(1, m, loss, SGD([*m.parameters(),*loss.parameters()], 1.), [data(8)], cbs=ClipGrad(1e-3), **quiet)
    assert 0<(loss.c.detach()-was).norm()<=1.001e-3
    scale = nn.Parameter(torch.ones(1))                 # of no module at all
    def loss_func(p, y): return loss(p*scale, y)
    opt,was = SGD([*m.parameters(),*loss.parameters(),scale], 1.),loss.c.detach().clone()
    fit(1, m, loss_func, opt, [data(8)], cbs=LRFinder(steps=20), **quiet)
    assert torch.equal(loss.c, was) and scale.item()==1
    fit(1, m, loss_func, opt, [data(8)], **quiet)
    assert not torch.equal(loss.c, was) and scale.item()!=1

@pytest.mark.parametrize('vals,patience,best,epochs', [
    ([3,2,1,1,1,0],2,None,5), ([3,2,1,1,.5,1,1],3,None,7), ([1,2,3,3,3],2,max,5), ([math.nan]*5,2,None,2),
    ([3,math.nan,2,math.nan,2.5,1],2,None,5), ([1,2,1],5,None,3)])
def test_early_stop(vals, patience, best, epochs):
    es,run = EarlyStop('valid_loss', patience, best),type('R', (), dict(stop=False, columns=['valid_loss'], figures=(), epoch=0))()
    es.before_fit(run)
    for i,v in enumerate(vals, 1):
        run.row = dict(valid_loss=v); es.after_epoch(run)
        new = EarlyStop('valid_loss', patience, best); new.load_state_dict(es.state_dict()); es = new
        if run.stop: break
    assert i==epochs and EarlyStop('accuracy').best is max
    with pytest.raises(ValueError, match="best is 'max'"): EarlyStop('valid_loss', best='max')
    with pytest.raises(RuntimeError, match="no 'acc' in the table"):
        fit(1, *setup(), cbs=EarlyStop('acc'), **quiet)
    es = EarlyStop('train_loss', 2, max)
    for _ in range(2): h = History(); fit(4, *setup(), cbs=[es, h], **quiet); assert len(h.rows)==3

@pytest.mark.parametrize('diverge', [False,True])
def test_lr_finder_puts_back(diverge):
    args,other = setup(),setup()
    for a in args,other: torch.manual_seed(2); fit(1, *a, **quiet)
    finder = LRFinder(lr_max=1e30 if diverge else 1., steps=100 if diverge else 30)
    torch.manual_seed(4)
    assert all(math.isnan(v) for v in fit(1, *args, cbs=finder, **quiet))
    assert same(weights(args[0]), weights(other[0])) and args[2].param_groups[0]['lr']==0.1
    fit(1, *args, **quiet)                              # momentum, random numbers and the loader too
    torch.manual_seed(4); fit(1, *other, **quiet)
    assert same(weights(args[0]), weights(other[0]))
    assert len(finder.lrs)==len(finder.losses) and (len(finder.lrs)<100 if diverge else len(finder.lrs)==30)
    assert finder.lrs[0]==1e-5 and finder.suggestion in [l/10 for l in finder.lrs]
    with pytest.raises(ValueError, match='gave no batches'): fit(1, *args[:3], [], cbs=LRFinder(), **quiet)
    with pytest.raises(ValueError, match='steps is 1'): LRFinder(steps=1)
    for f in LRFinder(),(nan := LRFinder()):
        if f is nan: f.lrs,f.losses = [1.],[math.nan]
        for g in f.plot,lambda: f.suggestion:
            with pytest.raises(ValueError, match='No finite loss'): g()

def test_lr_finder_puts_callbacks_back():
    args,h,acc = setup(),History(),Accumulate(4)
    sched = L.StepLR(args[2], 1)
    cbs = [h, acc, Schedule(sched)]
    fit(1, *args, cbs=cbs, **quiet)
    was = [h.rows[:], sched.state_dict()]
    fit(1, *args, cbs=[*cbs, LRFinder(steps=30)], **quiet)
    assert [h.rows, sched.state_dict()]==was

def test_smooth():
    f,m,want = LRFinder(),0.,[]
    f.losses = [3.,1.,4.,1.,5.]
    for i,l in enumerate(f.losses, 1): m = .9*m+.1*l; want.append(m/(1-.9**i))
    assert list(f.smooth())==pytest.approx(want)

def test_lr_finder_finds():
    # for f(w) = k/2 w^2, descent diverges beyond 2/k: the smallest loss comes at a rate near that
    for k in (1.,100.):
        m = nn.Linear(1,1,bias=False)
        finder = LRFinder(1e-6, 100, 200)
        fit(1, m, lambda p,y: (k/2*p**2).mean(), torch.optim.SGD(m.parameters(), 1.), [(torch.ones(4,1),torch.ones(4,1))]*10, metrics=(), cbs=finder, **quiet)
        assert .02/k<finder.suggestion<.5/k

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_amp(dtype):
    model,*rest = setup(bs=35); seen = set()
    model[0].register_forward_hook(lambda m,i,o: seen.add((o.dtype,m.weight.dtype)))
    a = fit(3, model, *rest, [data()], cbs=AMP(dtype), **quiet)
    b = fit(3, *setup(bs=35), [data()], **quiet)
    assert seen=={(dtype,torch.float32)} and a==pytest.approx(b, abs=.15) and not model._forward_hooks and not model._forward_pre_hooks

def test_amp_copies_and_pairs():
    copies = []
    class Copy(Callback):
        def after_batch(self, run):
            c = copy.deepcopy(run.model).eval()
            for p in c.parameters(): p.data.zero_()
            copies.append(c); assert not c(data()[0]).any()         # its own weights, not the live ones
    model,*rest = setup(bs=35)
    fit(1, model, *rest, cbs=[AMP(), Copy()], **quiet)
    assert not torch.is_autocast_enabled('cpu') and copies[0][0](data()[0]).dtype==torch.float32
    model.register_forward_hook(lambda m,i,o: 1/0, prepend=False)
    with pytest.raises(ZeroDivisionError): fit(1, model, *rest, cbs=AMP(), **quiet)
    bad = [(torch.randn(2,5),torch.tensor([0,1]))]
    with pytest.raises(RuntimeError): fit(1, m := net(), F.cross_entropy, SGD(m.parameters(), .1), bad, cbs=AMP(), **quiet)
    assert not torch.is_autocast_enabled('cpu')
    class Pair(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(6,3)
        def forward(self, x): return dict(a=self.l(x), n=3)
    seen,m = [],Pair()
    def loss_func(p, y): seen.append(p['a'].dtype); return F.cross_entropy(p['a'], y)
    fit(1, m, loss_func, SGD(m.parameters(), .1), [data(8)], metrics=None, cbs=AMP(), **quiet)
    assert seen==[torch.float32]

def test_amp_skips_overflow():
    model = nn.Linear(6,3); w,amp = model.weight.clone(),AMP(torch.float16)
    x,y = data(8); scales = []
    class Watch(Callback):
        def after_batch(self, run): scales.append((amp.scale,run.update))
    bad = lambda p,yb: F.cross_entropy(p, yb)*(1e36 if len(scales)<2 else 1)        # finite, but not its scaled gradient
    fit(1, model, bad, SGD(model.parameters(), .1), [(x,y)]*4, cbs=[amp, Watch()], **quiet)
    assert scales==[(2.**15,False),(2.**14,False),(2.**14,True),(2.**14,True)] and model.weight.isfinite().all() and not model.weight.equal(w)
    amp.good = 1999; fit(1, model, bad, SGD(model.parameters(), .1), [(x,y)], cbs=amp, **quiet)
    assert (amp.scale,amp.good)==(2.**15,0)
    new = AMP(torch.float16); new.load_state_dict(amp.state_dict()); assert new.scale==amp.scale

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cuda():
    def make():
        a = setup(); a[0].cuda()
        return a
    a,b = make(),make()
    fit(3, *a, [data()], cbs=[AMP(), ClipGrad(1.)], **quiet)
    assert torch.cuda.is_available() and a[0][0].weight.is_cuda and a[0][0].weight.dtype==torch.float32
    fit(1, *b, cbs=LRFinder(steps=20), **quiet)
    assert same(weights(b[0]), weights(make()[0]))
    assert predict(a[0], a[3]).is_cuda

# Penalties, masks, ends of epochs: what is added to the loss, and what is scaled

class L2(Callback):
    "A penalty, added where a callback would"
    def before_backward(self, run): run.loss = run.loss+.5*sum(p.pow(2).sum() for p in run.model.parameters())

def first_update(batches, *cbs, count=len):
    torch.manual_seed(0); m = nn.Linear(6,3); w = m.weight.detach().clone()
    fit(1, m, F.cross_entropy, torch.optim.SGD(m.parameters(), 1.), batches, metrics=(), cbs=list(cbs), count=count, **quiet)
    return w-m.weight.detach()

def penalized(x, y):
    torch.manual_seed(0); m = nn.Linear(6,3)
    (F.cross_entropy(m(x), y)+.5*sum(p.pow(2).sum() for p in m.parameters())).backward()
    return m.weight.grad

@pytest.mark.parametrize('order', [-30,-15,-5,5])
def test_a_penalty_is_not_scaled(order):
    "Whatever comes first, Accumulate, AMP or the penalty, one update is the gradient of mean loss plus penalty"
    x,y = data(64)
    l2 = L2(); l2.order = order
    want,parts = penalized(x, y),[(x[:40],y[:40]),(x[40:],y[40:])]
    for cbs in [], [AMP(torch.float16)], [Accumulate(2)], [Accumulate(2), AMP(torch.float16)]:
        got = first_update(parts if any(isinstance(c,Accumulate) for c in cbs) else [(x,y)], l2, *cbs)
        assert torch.allclose(got, want, atol=2e-3 if len(cbs) and isinstance(cbs[-1],AMP) else 1e-6), (order, cbs)

def test_accumulate_weighs_by_count():
    "Batches with masked targets: as one batch, where PyTorch's mean is over the targets that count"
    x,y = data(64); y[torch.rand(64, generator=torch.Generator().manual_seed(1))<torch.linspace(0,.9,64)] = -100
    want = first_update([(x,y)])
    got = first_update(list(zip(x.split(16), y.split(16))), Accumulate(4), count=lambda yb: (yb!=-100).sum())
    assert torch.allclose(got, want, atol=1e-6)
    assert not torch.allclose(first_update(list(zip(x.split(16), y.split(16))), Accumulate(4)), want, atol=1e-3)
    y[:32] = -100                                       # whole batches count for nothing
    want = first_update([(x,y)])
    got = first_update(list(zip(x.split(16), y.split(16))), Accumulate(2), count=lambda yb: (yb!=-100).sum())
    assert torch.allclose(got, want, atol=1e-6)

class Shorter(Callback):
    def before_epoch(self, run): run.batches = itertools.islice(run.batches, 7)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): yield from zip(*data(52))

@pytest.mark.parametrize('dl,n,cbs,updates', [(DataLoader(Dataset(*data(52)),5),3,[Shorter()],9), (DataLoader(Stream(),5),3,[],12),
    (DataLoader(Stream(),5),100,[],3), (list(zip(*(t.split(5) for t in data(52)))),4,[],9), (DataLoader(Dataset(*data(52)),5,drop_last=True),5,[],6)])
def test_the_end_of_an_epoch_closes_a_group(dl, n, cbs, updates):
    "Also of a shortened epoch and of a stream; and each update counts for a schedule and a clip"
    took = []
    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            took.append(max(p.grad.norm().item() for p in model.parameters()))
            return super().step(closure)
    model = nn.Linear(6,3); opt = Watched(model.parameters(), .1)
    sched = L.LambdaLR(opt, lambda i: 1.)
    fit(3, model, F.cross_entropy, opt, dl, metrics=(), cbs=[Accumulate(n), ClipGrad(1e-3), Schedule(sched), *cbs], **quiet)
    assert len(took)==updates and sched.last_epoch==updates and max(took)<=1.01e-3

# The best weights

class Set(Callback):
    "Gives the model a known figure in each epoch"
    def __init__(self, vals): self.vals = vals
    def after_batch(self, run): run.model.bias.data.fill_(self.vals[run.epoch])

def known(vals, *cbs, epochs=None):
    m = nn.Linear(1,1); opt = torch.optim.SGD(m.parameters(), 0.)
    def off(p, y): return m.bias.detach().sum()
    x = torch.zeros(4,1)
    out = fit(epochs or len(vals), m, lambda p,y: p.mean()*0+m.bias.sum(), opt, [(x,x)], [(x,x)], metrics=(off,), cbs=[Set(vals), *cbs], **quiet)
    return m.bias.item(),out

@pytest.mark.parametrize('cb,best', [(lambda: Best(), 1.), (lambda: Best('off'), 5.), (lambda: Best('off', min), 1.), (lambda: EarlyStop('valid_loss', 9, restore=True), 1.),
                                     (lambda: EarlyStop('valid_loss', 2), 4.)])
def test_best(cb, best, capsys):
    bias,out = known([3.,5.,1.,2.,4.], cb())
    assert bias==best and (out==(best,best) if best!=4. else out[0]==4.)
    if best!=4.: assert f': {dict(off="off").get(cb().metric, "valid_loss")} {best:.4f}' in capsys.readouterr().out

def test_best_over_a_resume_and_an_interruption(tmp_path):
    def ctrl_c(run):
        if run.epoch==3: raise KeyboardInterrupt
    m = []
    class Keep(Callback):
        def before_fit(self, run): m.append(run.model)
    with pytest.raises(KeyboardInterrupt): known([3.,1.,2.,4.,5.], Best(), Keep(), Each(ctrl_c), Checkpoint(tmp_path/'c', every=1))
    assert m[0].bias.item()==1.                         # what was best so far
    assert known([3.,1.,2.,4.,5.], Best(), Checkpoint(tmp_path/'c', every=1))==(1.,(1.,1.))

class Temp(nn.Module):
    "A loss with a weight and a buffer of its own"
    def __init__(self): super().__init__(); self.t = nn.Parameter(torch.ones(())); self.register_buffer('n', torch.zeros(()), persistent=False)
    def forward(self, p, yb):
        if torch.is_grad_enabled(): self.n += 1
        return F.cross_entropy(p*self.t, yb)+self.n/1000

class Mean(nn.Module):
    "Keeps a mean that `state_dict` leaves out, and draws from a generator of its own"
    def __init__(self): super().__init__(); self.l = nn.Linear(6,3); self.g = np.random.default_rng(0); self.register_buffer('mean', torch.zeros(6), persistent=False)
    def forward(self, x):
        if self.training: self.mean.mul_(.9).add_(x.mean(0)+self.g.random(), alpha=.1)
        return self.l(x-self.mean)

def mends():
    torch.manual_seed(0)
    m,loss = Mean(),Temp(); x,y = torch.randn(48,6),torch.randint(3,(48,))
    opt = torch.optim.SGD([*m.parameters(), *loss.parameters()], .5)
    return m,loss,opt,DataLoader(Dataset(x[:24],y[:24]), 4, shuffle=True),DataLoader(Dataset(x[24:],y[24:]), 8)

@pytest.mark.parametrize('cb', [lambda: Best(), lambda: EarlyStop(patience=2, restore=True)])
def test_best_puts_back_all_that_was_trained(cb):
    m,loss,opt,dl,v = mends()
    h = History(); got = fit(8, m, loss, opt, dl, v, cbs=[h,cb()], progress=False)
    losses = [r['valid_loss'] for r in h.rows]
    assert min(losses)<losses[-1]                            # there was something to put back
    assert got==pytest.approx(evaluate(m, loss, v), rel=1e-6) and got[0]==pytest.approx(min(losses), rel=1e-6)

def test_finder_puts_back_all_that_was_trained():
    m,loss,opt,dl,v = mends()
    fit(1, m, loss, opt, dl, v, cbs=LRFinder(steps=9), progress=False)
    a,la,*_ = mends()
    assert all(torch.equal(p, q) for p,q in zip([*m.parameters(), *loss.parameters(), *m.buffers(), *loss.buffers()], [*a.parameters(), *la.parameters(), *a.buffers(), *la.buffers()]))
    assert m.g.random()==a.g.random()

class Batches(Callback):
    def before_fit(self, run): self.n = []
    def before_epoch(self, run): self.n.append(0)
    def after_batch(self, run): self.n[-1] += 1

def test_finder_after_a_look_at_a_batch():
    m,loss,opt,dl,v = mends(); c = Batches()
    next(iter(dl))
    fit(1, m, loss, opt, dl, cbs=LRFinder(steps=9), progress=False)
    fit(2, m, loss, opt, dl, cbs=c, progress=False)
    assert c.n==[6,6]
    it = iter(dl); next(it); dl.load_state_dict(dl.state_dict())       # what is left of an epoch is still left after it
    fit(1, m, loss, opt, dl, cbs=LRFinder(steps=9), progress=False)
    fit(2, m, loss, opt, dl, cbs=c, progress=False)
    assert c.n==[5,6]

def test_a_refused_fit_leaves_the_weights_alone():
    m,loss,opt,dl,v = mends(); es = EarlyStop(restore=True)
    fit(2, m, loss, opt, dl, v, cbs=es, progress=False)
    fit(2, m, loss, opt, dl, v, progress=False)
    was = [p.detach().clone() for p in m.parameters()]
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(m.parameters(), .1), 1)
    with pytest.raises(RuntimeError, match='another optimizer'): fit(1, m, loss, opt, dl, v, cbs=[Schedule(other, 'epoch'), es], progress=False)
    assert all(torch.equal(p, q) for p,q in zip(was, m.parameters()))

def test_patience_is_at_least_1():
    with pytest.raises(ValueError, match='patience is 0'): EarlyStop(patience=0)
