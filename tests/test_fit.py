"fit, evaluate, predict and what belongs to them, as a user meets them"
import math, os, re, signal, subprocess, sys, traceback
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim import lr_scheduler as L
from torch.utils._pytree import tree_leaves
import minibatch.training as T
from minibatch.callbacks import Accumulate, Schedule
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

class Stop(Callback):
    "Does what Ctrl-C does"
    def __init__(self, epoch, batch): self.at = epoch,batch
    def after_batch(self, run):
        if (run.epoch,run.batch)==self.at: signal.raise_signal(signal.SIGINT)

class At(Callback):
    "Calls f(run) after so many batches of the run"
    def __init__(self, n, f): self.n,self.f = n,f
    def after_batch(self, run):
        self.n -= 1
        if not self.n: self.f(run)

@pytest.mark.parametrize('Opt', [SGD,torch.optim.SGD])
@pytest.mark.parametrize('Dl', [DataLoader,torch.utils.data.DataLoader])
def test_fit_is_the_loop(Opt, Dl):
    a,b = setup(Opt=Opt, Dl=Dl),setup(Opt=Opt, Dl=Dl)
    xv,yv = data(20, seed=5)
    torch.manual_seed(7); res = fit(2, *a, [(xv,yv)], cbs=[], **quiet)
    torch.manual_seed(7)
    model,loss_func,opt,dl = b
    for _ in range(2):
        model.train()
        for xb,yb in dl: loss_func(model(xb), yb).backward(); opt.step(); opt.zero_grad()
        model.eval()
        with torch.no_grad(): p = model(xv)
    assert same(weights(a[0]), weights(model))
    assert res==pytest.approx((F.cross_entropy(p, yv).item(), (p.argmax(1)==yv).double().mean().item()), rel=1e-6)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1,9), min_size=1, max_size=150), st.integers(0,1000))
def test_means_of_ragged_batches(sizes, seed):
    model = net()
    model[4].requires_grad_(False); model[1].eval()
    x,y = data(sum(sizes), seed=seed)
    model.eval()
    with torch.no_grad(): p = model(x).double()
    want = F.cross_entropy(p, y).item(),(p.argmax(1)==y).double().mean().item(),(y.double()**2).mean().item()
    model.train(); model[1].eval()
    def square(preds, yb): return (yb.double()**2).mean().item()      # a float, not a tensor
    got = evaluate(model, F.cross_entropy, list(zip(x.split(sizes), y.split(sizes))), (T.accuracy, square))
    assert got==pytest.approx(want, rel=1e-5, abs=1e-6)
    assert model.training and not model[1].training and model[3].training
    opt = torch.optim.SGD(model.parameters(), 0.)
    model[3].p = 0.; h = History()
    res = fit(1, model[:1].append(model[4]), F.mse_loss, torch.optim.SGD(model.parameters(), 0.),
              list(zip(x.split(sizes), torch.zeros(len(x),3).split(sizes))), metrics=(), cbs=h, **quiet)
    with torch.no_grad(): want = model[4](model[0](x)).double().pow(2).mean().item()
    assert res==pytest.approx((want,), rel=1e-5) and h.rows[0]['train_loss']==res[0]

def test_predict_is_one_forward_pass():
    x,y = data(23)
    model = net(); model[4].eval()
    modes = [m.training for m in model.modules()]
    ds = torch.utils.data.TensorDataset(x,y)
    model.eval()
    want = model(x).detach()
    for m,was in zip(model.modules(), modes): m.training = was
    alone = [DataLoader([*x], 5), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 5), x.split(5), [(x,)], [[x]]]
    for dl in DataLoader(ds, 5), DataLoader(ds, 23), [(x,y)], [dict(x=x, y=y)], *alone:
        got = predict(model, dl)
        assert torch.allclose(got, want, atol=1e-6) and not got.requires_grad
    assert [m.training for m in model.modules()]==modes

def test_predict_trees():
    class Two(nn.Module):
        def forward(self, a, b): return dict(sum=a+b, parts=(a, (b[:,:2],)))
    a,b,y = torch.randn(7,3),torch.randn(7,3),torch.zeros(7)
    got = predict(Two(), zip(a.split(4), b.split(4), y.split(4)))
    assert torch.equal(got['sum'], a+b) and torch.equal(got['parts'][0], a) and torch.equal(got['parts'][1][0], b[:,:2])
    with pytest.raises(TypeError, match='missing 1 required'): predict(Two(), [(a,b)])          # b is taken for a target: heard, not swapped

def test_predict_refuses():
    m = nn.Linear(6,3); x,y = data(8)
    def no(match, dl):
        with pytest.raises(ValueError, match=match): predict(m, dl)
    no('gave no batches', [])
    no('gave no batches', DataLoader([*x], 9, drop_last=True))
    no(r'such as \[x\]|as \[x\]', x)
    no('not single examples', torch.utils.data.TensorDataset(x,y))       # a dataset in place of a loader
    no('inputs first and the target last', [3])
    m.train()
    with pytest.raises(RuntimeError): predict(m, [x[:,:5]])
    assert m.training and torch.is_grad_enabled()

def test_kinds_of_batches():
    class Two(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(0); self.l = nn.Linear(3,2)
        def forward(self, a, b): return self.l(a*b)
    a,b,y = torch.randn(9,3),torch.randn(9,3),torch.randint(0,2,(9,))
    def go(*batch):
        m = Two()
        return fit(2, m, F.cross_entropy, SGD(m.parameters(), .1), batch, batch, **quiet)
    want = go((a,b,y))
    assert go([a,b,y])==want and go(dict(left=a, right=b, target=y))==want
    for match,bads in (('inputs first and the target last', [(a,), [a], {'x':a}, a, 3, 'text']),
                       ('length, that of the inputs, or else give count=', [(a,b,3.), (a,b,None), (a,b,torch.tensor(1.)), (a,b,{'y':y}), (a,b,[y,y]), (a,b,(y,y)), (a,b,'text')])):
        for bad in bads:
            for args in ([bad],),([(a,b,y)],[bad]):
                m = Two()
                with pytest.raises(ValueError, match=match): fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), *args, **quiet)

@pytest.mark.parametrize('pack', [lambda y,z: dict(y=y, z=z), lambda y,z: (y,z), lambda y,z: [dict(y=y), z]])
def test_nested_targets(pack):
    x,y = data(10); z = torch.randn(10,2)
    batches = [(x[i],pack(y[i],z[i])) for i in (slice(7),slice(7,10))]
    loss = lambda p,t: F.cross_entropy(p, tree_leaves(t)[0])
    m = nn.Linear(6,3)
    assert evaluate(m, loss, batches, (), count=lambda t: len(tree_leaves(t)[0]))==pytest.approx((F.cross_entropy(m(x), y).item(),), rel=1e-5)
    assert all(t.is_meta for t in tree_leaves(T._unpack(batches[0], m, torch.device('meta'), lambda t: 1)[:2]))

def test_float_metrics_beside_another_device():
    class There(torch.Tensor):              # as on a GPU: cannot be stacked with a CPU tensor
        @classmethod
        def __torch_function__(cls, f, types, args=(), kwargs=None):
            if f is torch.stack and any(type(t) is not There for t in args[0]): raise RuntimeError('Expected all tensors to be on the same device')
            return super().__torch_function__(f, types, args, kwargs or {})
    m = T._Means()
    for i in range(3): m.add((torch.tensor(1.).as_subclass(There), .5, i, np.float32(2)), 4)
    assert m()==(1.,.5,1.,2.)

def test_no_gradients_where_none_are_needed():
    def metric(preds, yb): assert not preds.requires_grad and not (preds*torch.ones(1, requires_grad=True)).requires_grad; return 0.
    def lazy(preds, yb): assert not (preds*torch.ones(1, requires_grad=True)).requires_grad; return 0.
    args = setup()
    fit(1, *args, [data()], metrics=metric, **quiet)
    evaluate(args[0], args[1], [data()], metric)
    fit(1, *args, metrics=lazy, **quiet)                # the training batches' own: their predictions have a gradient, the metric makes none

def test_step_is_called():
    seen,args = [],setup()
    def step(run): seen.append(run.n); T.train_step(run)
    fit(1, *args, step=step, **quiet)
    assert seen==[8]*8+[6]

def test_frozen_parts_stay():
    model,loss_func,opt,dl = setup()
    body = model[:2].requires_grad_(False)                  # a Linear and a BatchNorm; dropout has no parameters, and is not frozen
    body.eval(); model[3].eval()
    was = model[1].running_mean.clone()
    fit(2, model, loss_func, opt, dl, [data()], **quiet)
    assert torch.equal(was, model[1].running_mean) and not model[1].training and model[3].training and model.training
    model[1].train()                                        # frozen, but to go on counting
    fit(1, model, loss_func, opt, dl, **quiet)
    assert not torch.equal(was, model[1].running_mean) and not model[0].training
    model.eval().requires_grad_(True)                       # after a look at it
    fit(1, model, loss_func, opt, dl, **quiet)
    assert all(m.training for m in model.modules())
    nested = nn.Sequential(nn.Sequential(nn.Linear(6,8), nn.BatchNorm1d(8, affine=False)).eval().requires_grad_(False), nn.Linear(8,3))
    fit(1, nested, loss_func, SGD(nested[1].parameters(), 0.1), dl, **quiet)
    assert not nested[0][1].training and not nested[0][1].running_mean.any()    # has no parameters, but its parent has

def test_no_gradients_left():
    for cbs in Accumulate(4),At(3, lambda run: signal.raise_signal(signal.SIGINT)):
        m = nn.Linear(6,3)
        try: fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), (data(4) for _ in range(6)), cbs=cbs, **quiet)
        except KeyboardInterrupt: pass
        assert all(p.grad is None for p in m.parameters())

def test_ctrl_c(capsys):
    ended = []
    class Ended(Callback):
        def after_fit(self, run): ended.append(run.figures)
    h = History()
    with pytest.raises(KeyboardInterrupt) as e: fit(3, *setup(), cbs=[h, Stop(1,5), Ended()], **quiet)
    assert capsys.readouterr().out=='Interrupted in epoch 2 after batch 5\n'
    assert len(h.rows)==1 and ended[0][0]==h.rows[0]['train_loss']
    assert len(traceback.extract_tb(e.tb))==2 and e.value.__suppress_context__     # here, and fit

@pytest.mark.parametrize('before', [0,1])
def test_ctrl_c_in_validation(before, capsys):
    class Valid:
        n = 0
        def __iter__(self):
            self.n += 1; yield data(10)
            if self.n>before: signal.raise_signal(signal.SIGINT)
            yield data(10)
    h = History()
    with pytest.raises(KeyboardInterrupt): fit(3, *setup(), Valid(), cbs=h, **quiet)
    assert f'Interrupted in epoch {before+1} after batch 9' in capsys.readouterr().out and len(h.rows)==before

def test_ctrl_c_ends_the_loader():
    ended = []
    class Endless:
        def __iter__(self):
            try:
                while True: yield data(4)
            finally: ended.append(1)
    class Look(Callback):
        def after_fit(self, run): assert ended
    m = nn.Linear(6,3)
    with pytest.raises(KeyboardInterrupt): fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), Endless(), cbs=[Stop(0,3), Look()], **quiet)

def test_after_fit_all_run():
    seen = []
    class A(Callback):
        def __init__(self, name): self.name = name
        def after_fit(self, run): seen.append(self.name); raise KeyError(self.name)
    with pytest.raises(RuntimeError, match='two') as e: fit(1, *setup(), cbs=[A('one'), A('two')], **quiet)
    told = ''.join(traceback.format_exception(e.value))
    assert seen==['one','two'] and "KeyError: 'one'" in told

def test_bad_input():
    model,loss_func,opt,dl = setup()
    def no(match, exc=ValueError, **kw):
        with pytest.raises(exc, match=match): fit(**{**dict(epochs=1, model=model, loss_func=loss_func, opt=opt, train_dl=dl, progress=False), **kw})
    no('epochs is 0', epochs=0)
    no('gave no batches', train_dl=[])
    no('gave no batches', train_dl=(b for b in list(dl)), epochs=2)      # used up after the first epoch
    no('gave no batches', valid_dl=[])
    no('gave no batches', train_dl=DataLoader(dl.dataset, 100, drop_last=True))
    no('holds none of the weights', model=net())
    no('is no Callback object', TypeError, cbs=[History])
    no('a name of its own', metrics=[lambda p,y: 0., lambda p,y: 1.])
    def named(n):
        def f(p, y): return 0.
        f.__name__ = n
        return f
    for n in 'epoch','train_loss','valid_loss','seconds','loss': no('and none of epoch', metrics=named(n))
    for e in 2.5,'3',None: no(f'epochs is {e!r}: expected a whole number', epochs=e)
    for o in None,F.cross_entropy: no('is no optimizer that fit can use; expected one such as SGD', TypeError, opt=o)
    no('LBFGS', TypeError, opt=torch.optim.LBFGS(model.parameters()))
    no('loss_func gave 1.0; expected one number with a gradient', loss_func=lambda p,y: 1.)
    no(r'loss_func gave \(tensor', loss_func=lambda p,y: (F.cross_entropy(p,y),1))
    no(r'a tensor of shape \(\); expected one number with a gradient', loss_func=lambda p,y: F.cross_entropy(p.detach(),y))
    frozen = net().requires_grad_(False)
    no('Are all parameters frozen', model=frozen, opt=torch.optim.SGD(frozen.parameters(), .1))
    no(r'got \(1, 2\)', metrics=lambda p,y: (1,2))
    assert len(fit(1, model, loss_func, opt, dl, metrics=None, cbs=None, **quiet))==1==len(evaluate(model, loss_func, dl, None))
    with pytest.raises(ValueError, match='no rows to plot'): History().plot()
    no(r'loss_func gave a tensor of shape \(8,\)', loss_func=lambda p,y: F.cross_entropy(p, y, reduction='none'))
    no('one number per batch', metrics=[lambda p,y: p.mean(0)])
    with pytest.raises(TypeError, match='Bad.after_bach: there is no such hook'):
        class Bad(Callback):
            def after_bach(self, run): pass

@pytest.mark.parametrize('n', [1,2,99,100,101,250,257])
def test_names_the_bad_batch(n):
    x,y = data(257*2)
    model = nn.Linear(6,3)
    batches = [(a*(math.nan if i==n else 1),b) for i,(a,b) in enumerate(zip(x.split(2), y.split(2)), 1)]
    opt = SGD(model.parameters(), 0.5)
    seen = []
    class Count(Callback):
        def after_batch(self, run): seen.append(run.batch)
    with pytest.raises(RuntimeError, match=f'The loss is nan in epoch 1, batch {n}; lr is 0.5. Try a smaller lr'):
        fit(3, model, F.cross_entropy, opt, batches, cbs=Count(), **quiet)
    assert len(seen)==min(-(-n//100)*100, 257)           # noticed when the next hundred are read

def test_validation_not_finite():
    args = setup()
    with pytest.raises(RuntimeError, match='loss is nan in epoch 1, validation'): fit(1, *args, [(torch.full((2,6),math.nan),torch.tensor([0,1]))], **quiet)

def test_no_sync_in_the_loop(monkeypatch):
    calls = []
    for f in 'item','tolist','__float__','__bool__': monkeypatch.setattr(torch.Tensor, f, (lambda g,f: lambda *a: calls.append(f) or g(*a))(getattr(torch.Tensor,f),f))
    x,y = data(2*150); m = nn.Linear(6,3)
    fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), list(zip(x.split(2),y.split(2))), metrics=(), **quiet)
    assert len(calls)<=4        # 150 batches, two reads

def test_stale_gradients_and_mode():
    a,b = setup(),setup()
    a[1](a[0](data()[0]), data()[1]).backward()
    a[0].load_state_dict(net(1).state_dict()); a[0].eval()
    torch.manual_seed(5); fit(1, *a, **quiet)
    torch.manual_seed(5); fit(1, *b, **quiet)
    assert same(weights(a[0]), weights(b[0])) and all(p.grad is None for p in a[0].parameters())

def test_hooks_and_order():
    seen = []
    def cb(name, order_): return type(name, (Callback,), dict(order=order_, **{h: (lambda h: lambda self,run: seen.append((name,h,run.epoch,run.batch)))(h) for h in Callback.hooks}))()
    x,y = data(4)
    m = nn.Linear(6,3)
    fit(2, m, F.cross_entropy, SGD(m.parameters(), .1), [(x,y)]*2, cbs=[cb('B',1), cb('A',0)], **quiet)
    per_batch = 'before_batch before_backward after_backward after_batch'.split()
    want = ['before_fit', *(['before_epoch', *per_batch*2, 'after_epoch']*2), 'after_fit']
    assert [h for n,h,*_ in seen]==[h for h in want for _ in 'AB'] and [n for n,*_ in seen[:4]]==['A','B']*2
    run = Run(1, m, F.cross_entropy, SGD(m.parameters(), .1), [], None, None, History())
    assert [len(getattr(run,h)) for h in Callback.hooks]==[0,0,0,0,0,0,1,0]

@pytest.mark.parametrize('hook', Callback.hooks)
def test_error_names_callback(hook):
    def boom(self, run): raise KeyError('oops')
    args = setup()
    with pytest.raises(RuntimeError, match=f'Boom.{hook} failed after [01] epochs and [019] batches: KeyError: .oops.') as e:
        fit(1, *args, cbs=[type('Boom', (Callback,), {hook:boom})()], **quiet)
    assert isinstance(e.value.__cause__, KeyError)

def test_history():
    h = History(); fit(2, *setup(), [data()], cbs=h, **quiet)
    assert [*h.rows[0]]==['epoch','train_loss','valid_loss','accuracy','seconds']
    import matplotlib; matplotlib.use('agg')
    axs = h.plot()
    assert [l.get_label() for l in axs[0].get_lines()]==['train_loss','valid_loss'] and [l.get_label() for l in axs[1].get_lines()]==['accuracy']
    assert list(axs[1].get_lines()[0].get_ydata())==[r['accuracy'] for r in h.rows]
    h = History(); fit(1, *setup(), cbs=h, **quiet)
    assert [*h.rows[0]]==['epoch','train_loss','train_accuracy','seconds'] and [ax.get_title() for ax in h.plot()]==['Loss','Metrics']
    fit(1, *setup(), metrics=(), cbs=(h := History()), **quiet)
    assert [ax.get_title() for ax in h.plot()]==['Loss']

# What a batch weighs

def ignored(n=60, share=0.5):
    x,y = data(n)
    return x,torch.where(torch.arange(n)<n*share, y, -100)[torch.randperm(n, generator=torch.Generator().manual_seed(1))]

W = torch.tensor([1.,1.,20.])
KINDS = dict(ignore=(F.cross_entropy, lambda yb: (yb!=-100).sum(), ignored), weights=(nn.CrossEntropyLoss(weight=W), lambda yb: W[yb].sum(), lambda: data(60)),
             number=(F.cross_entropy, lambda yb: int((yb!=-100).sum()), ignored))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bs', [60,25,7,1])
def test_count(kind, bs):
    loss_func,count,make = KINDS[kind]
    x,y = make(); m = nn.Linear(6,3); batches = list(zip(x.split(bs), y.split(bs)))
    want = loss_func(m(x), y).item()
    assert evaluate(m, loss_func, batches, (), count)==pytest.approx((want,), rel=1e-5)
    h = History()                                            # lr 0: the training loss is of the same net
    assert fit(1, m, loss_func, torch.optim.SGD(m.parameters(), 0.), batches, batches, (), h, count=count, **quiet)==pytest.approx((want,), rel=1e-5)
    assert h.rows[0]['train_loss']==pytest.approx(want, rel=1e-5)

def test_batches_without_weight():
    "They train nothing and call no hook, but were walked"
    x,y = data(40); y[:10] = -100; y[25:] = -100
    batches = list(zip(x.split(5), y.split(5)))
    def count(yb): return (yb!=-100).sum()
    seen,a,b = [],nn.Linear(6,3),nn.Linear(6,3)
    b.load_state_dict(a.state_dict())
    class See(Callback):
        def before_batch(self, run): seen.append(('before',run.batch,run.n))
        def after_batch(self, run): seen.append(('after',run.batch,run.ended,bool(run.batches)))
    fit(1, a, F.cross_entropy, SGD(a.parameters(), .1, .9), batches, cbs=See(), metrics=(), count=count, **quiet)
    fit(1, b, F.cross_entropy, SGD(b.parameters(), .1, .9), batches[2:5], metrics=(), **quiet)
    assert same(weights(a), weights(b)) and all(w.isfinite().all() for w in a.parameters())
    assert seen==[('before',0,5),('after',3,False,True),('before',3,5),('after',4,False,True),('before',4,5),('after',5,False,False)]
    with pytest.raises(ValueError, match='count. gave each of them the weight 0'): evaluate(a, F.cross_entropy, batches[:2], (), count)
    with pytest.raises(ValueError, match='the weight 0'): fit(1, a, F.cross_entropy, SGD(a.parameters(), .1), batches[5:], count=count, **quiet)

def test_bad_batch_is_named_with_those_of_no_weight():
    x,y = data(12); y[:6] = -100; x[8] = math.nan
    m = nn.Linear(6,3)
    with pytest.raises(RuntimeError, match='epoch 1, batch 5'):
        fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), list(zip(x.split(2), y.split(2))), count=lambda yb: (yb!=-100).sum(), **quiet)

@pytest.mark.parametrize('bad', [-1, math.nan, math.inf, torch.tensor(-.5)])
def test_bad_count(bad):
    with pytest.raises(ValueError, match='count gave'): evaluate(nn.Linear(6,3), F.cross_entropy, [data(4)], count=lambda yb: bad)

def test_count_sees_the_target_before_it_moves():
    seen = []
    T._unpack(data(4), nn.Linear(6,3), torch.device('meta'), lambda yb: seen.append(yb.device.type) or 1)
    assert seen==['cpu']

def test_list_of_targets():
    k = [1,3,2,5,1,4,2]
    ts = [dict(boxes=torch.zeros(n,4)) for n in k]
    def loss(p, ts): return p.mean()*0+sum(float(len(t['boxes'])) for t in ts)/len(ts)
    x = torch.randn(7,4)
    for bs in 7,3,2: assert evaluate(nn.Linear(4,1), loss, [(x[i:i+bs],ts[i:i+bs]) for i in range(0,7,bs)], ())==pytest.approx((sum(k)/7,), rel=1e-6)

# Dicts

class Both(nn.Module):
    def forward(self, a, b=None, *, c=0.): return a-2*b+c

@pytest.mark.parametrize('keys,want', [('ab',5-4), ('ba',2-10), ('xy',5-4), ('abc',5-4+1), ('cba',1-4+5)])
def test_dicts_by_name(keys, want):
    inputs = {k:torch.full((4,), v) for k,v in zip(keys, (5.,2.,1.))}
    assert predict(Both(), [dict(inputs, label=torch.zeros(4))]).tolist()==[want]*4

@pytest.mark.parametrize('keys', ['axy','xay','yab','xya','ab','xa'])
def test_dicts_refused(keys):
    "Names that forward knows in part, such as where the target comes first, or is missing"
    with pytest.raises(ValueError, match=r'Both.forward has \[.*all inputs should be called as its arguments, and the last, the target, not'):
        predict(Both(), [{k:torch.zeros(4) for k in keys}])

def test_dicts_and_wrappers():
    class Any(nn.Module):
        def forward(self, **kw): return Both()(**kw)
    from collections import UserDict
    batch = UserDict(b=torch.ones(4), a=torch.zeros(4), y=torch.zeros(4))
    assert predict(Any(), [batch]).tolist()==predict(Both(), [batch]).tolist()==[-2.]*4

# Whole figures

def test_whole():
    calls = []
    def med(preds, yb):
        assert preds.device.type==yb.device.type=='cpu' and not preds.requires_grad
        calls.append(len(yb)); return np.float32(preds.median())
    x,y = data(23); m = nn.Linear(6,1)
    batches = list(zip(x.split(5), y.split(5)))
    loss,a,b = evaluate(m, lambda p,y: p.mean(), batches, [whole(med), lambda p,y: p.mean()])
    assert calls==[23] and a==m(x).median().item() and loss==b and type(a) is float

def test_whole_trees_and_weights():
    class Tree(nn.Module):
        def forward(self, x): return dict(s=x, t=(x[:,0],))
    x,y = data(9)
    def f(preds, yb): return float(torch.equal(preds['s'], x[3:]) and torch.equal(preds['t'][0], x[3:,0]) and torch.equal(yb[0], y[3:]))
    batches = [(x[i:i+3],(y[i:i+3],y[i:i+3])) for i in (0,3,6)]
    assert evaluate(Tree(), lambda p,y: p['s'].mean(), batches, whole(f), count=lambda t: 0 if t[0] is batches[0][1][0] else 3)[1]==1.

def test_whole_refuses():
    args = setup()
    with pytest.raises(ValueError, match='give a valid_dl'): fit(1, *args, metrics=whole(T.accuracy), **quiet)
    def bad(preds, yb): return preds@yb
    with pytest.raises(ValueError, match=r'bad failed, with a tensor of shape \(10, 3\) as predictions and a tensor of shape \(10,\)'): evaluate(args[0], args[1], [data(10)], whole(bad))
    with pytest.raises(ValueError, match='<lambda> should give one number'): evaluate(args[0], args[1], [data(10)], whole(lambda p,y: p))

# What is known before the first batch

def test_told_before_training():
    def never(run): raise AssertionError('trained')
    def bad(preds, yb): return (preds==yb).float().mean()
    args = setup()
    valid = DataLoader(torch.utils.data.TensorDataset(*data(10)), 5)
    for kw,match in ((dict(metrics=bad), r'bad failed, with a tensor of shape \(5, 3\) as predictions and a tensor of shape \(5,\) as target: RuntimeError'),
                     (dict(valid_dl=[]), 'gave no batches'), (dict(valid_dl=valid.dataset), 'should have a length'),
                     (dict(loss_func=F.nll_loss, metrics=(), valid_dl=[(data(5)[0],torch.zeros(5,3))]), 'nll_loss failed')):
        with pytest.raises(ValueError, match=match): fit(**{**dict(epochs=1, model=args[0], loss_func=args[1], opt=args[2], train_dl=args[3], valid_dl=valid, step=never), **kw}, **quiet)
    with pytest.raises(ValueError, match='bad failed'): fit(1, *args, metrics=bad, **quiet)         # after the first batch

@pytest.mark.parametrize('Dl', [DataLoader,torch.utils.data.DataLoader])
def test_rehearsal_leaves_no_trace(Dl):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6,3)
            self.register_buffer('calls', torch.zeros(())); self.register_buffer('last', torch.zeros(()))
        def forward(self, x):
            self.calls += 1; self.last = torch.rand(())+np.random.rand()
            return self.l(x)
    m = Noisy()
    valid = Dl(torch.utils.data.TensorDataset(*data(10)), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    next(iter(valid))                                       # left in the middle of an epoch
    run = Run(1, m, F.cross_entropy, SGD(m.parameters(), .1), [], valid, T.accuracy)
    modes,was = [p.training for p in m.modules()],{k:v.clone() for k,v in m.state_dict().items()}
    torch.manual_seed(0); np.random.seed(0)
    want = torch.rand(3),np.random.rand()
    def state(): return valid.state_dict() if hasattr(valid,'state_dict') else None
    torch.manual_seed(0); np.random.seed(0); ids,at = [id(b) for b in m.buffers()],state()
    T._rehearse(run)
    assert state()==at
    assert torch.equal(torch.rand(3), want[0]) and np.random.rand()==want[1]
    assert same(was, weights(m)) and ids==[id(b) for b in m.buffers()] and modes==[p.training for p in m.modules()]
    other = Dl(valid.dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(3)); next(iter(other))
    assert all(torch.equal(a, b) for a,b in zip((t for b in valid for t in b), (t for b in other for t in b), strict=True))

def test_streams_lose_nothing():
    class Stream(torch.utils.data.IterableDataset):
        def __init__(self): self.it = iter(range(8))
        def __len__(self): return 8
        def __iter__(self): return ((data(1, seed=i)[0][0],0) for i in self.it)
    x,y = data(8)
    want = torch.cat([data(1, seed=i)[0] for i in range(8)])
    batches = list(zip(want.split(4), torch.zeros(8).long().split(4)))
    for valid in iter(batches),(b for b in batches),DataLoader(Stream(), 4),torch.utils.data.DataLoader(Stream(), 4):
        m,seen = nn.Linear(6,3),[]
        m.register_forward_pre_hook(lambda m,args: None if m.training else seen.append(args[0]))
        fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), [(x,y)], valid, **quiet)
        assert torch.equal(torch.cat(seen), want)

def test_columns():
    seen = []
    class Cols(Callback):
        def before_fit(self, run): seen.append(run.columns)
    for valid in None,[data()]:
        h = History(); fit(1, *setup(), valid, cbs=[Cols(), h], **quiet)
        assert seen.pop()==[*h.rows[0]]

def test_scale_comes_last():
    class Penalty(Callback):
        def before_backward(self, run): run.loss = run.loss+run.model.weight.square().sum()
    class Scale(Callback):
        order = -1
        def before_backward(self, run): run.scale *= 4
        def after_backward(self, run): seen.append(run.model.weight.grad/4)
    x,y = data(); m = nn.Linear(6,3); seen,h = [],History()
    want, = torch.autograd.grad(F.cross_entropy(m(x), y)+m.weight.square().sum(), m.weight)
    loss = F.cross_entropy(m(x), y).item()
    fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), [(x,y)], cbs=[Penalty(), Scale(), h], **quiet)
    assert torch.allclose(seen[0], want) and h.rows[0]['train_loss']==pytest.approx(loss)

# Progress

SLOW = '''
import time, torch
from minibatch.training import *
class Slow:
    def __len__(self): return 4
    def __iter__(self):
        for _ in range(4): time.sleep(0.2); yield torch.randn(4,6),torch.tensor([0,1,2,0])
m = torch.nn.Linear(6,3)
res = fit(2, m, torch.nn.functional.cross_entropy, torch.optim.SGD(m.parameters(), 0.1), Slow(), cbs=())
'''
TABLE = r'epoch +train_loss +train_accuracy +seconds *\n +1 +[\d.]+ +[\d.]+ +[\d.]+ *\n +2 +[\d.]+ +[\d.]+ +[\d.]+ *\n?'
ENV = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(T.__file__).parents[1]), os.environ.get('PYTHONPATH','')]))

def test_progress_log(capfd):
    fit(1, *setup(), **quiet)
    assert capfd.readouterr()==('','')
    r = subprocess.run([sys.executable,'-c',SLOW], capture_output=True, text=True, env=ENV)
    assert r.stderr=='' and re.fullmatch(TABLE, r.stdout)

@pytest.mark.parametrize('cols', [40,80])
def test_progress_terminal(cols):
    import fcntl, pty, struct, termios
    main,sub = pty.openpty()
    fcntl.ioctl(sub, termios.TIOCSWINSZ, struct.pack('HHHH', 24, cols, 0, 0))
    p = subprocess.Popen([sys.executable,'-c',SLOW], stdout=subprocess.PIPE, stderr=sub, text=True, env=ENV)
    os.close(sub); out = b''
    try:
        while piece := os.read(main, 4096): out += piece
    except OSError: pass                                # the other end is closed
    assert re.fullmatch(TABLE, p.stdout.read()) and p.wait()==0
    out = out.decode()
    assert 'epoch 1:' in out and 'epoch 2:' in out and '/4 ' in out and '\n' not in out
    assert max(map(len, out.replace('\x1b[A','').split('\r')))<=cols
    assert out.endswith('\r') and out.split('\r')[-2].strip()==''      # wiped

def test_progress_notebook():
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLOW)])
    NotebookClient(nb, kernel_name='python3').execute(env=ENV)
    o, = nb.cells[0].outputs
    assert o.output_type=='display_data' and [*o.data]==['text/plain'] and re.fullmatch(TABLE, o.data['text/plain']+'\n')

def test_ctrl_c_in_a_notebook():
    import nbformat
    from nbclient import NotebookClient
    stop = '''
class Stop(Callback):
    def after_batch(self, run):
        if (run.epoch,run.batch)==(1,3): raise KeyboardInterrupt
'''
    code = SLOW.replace('class Slow', stop+'class Slow').replace('fit(2,', 'fit(3,').replace('cbs=()', 'cbs=Stop()')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, kernel_name='python3', allow_errors=True).execute(env=ENV)
    table,line,error = nb.cells[0].outputs
    assert re.fullmatch(r'epoch .*seconds *\n +1 .*', table.data['text/plain']) and line.text=='Interrupted in epoch 2 after batch 3\n'
    assert error.ename=='KeyboardInterrupt' and len(error.traceback)<=5 and len('\n'.join(error.traceback).split('\n'))<40

def test_a_group_added_during_a_run():
    "Its parameters begin with the gradient of their first batch, as in a loop with zero_grad"
    x,y = data(24); dl = list(zip(x.split(8), y.split(8)))
    def make(): torch.manual_seed(0); m = nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,3)); return m,torch.optim.SGD(m[2].parameters(), .1)
    def add(m, opt): opt.add_param_group(dict(params=[*m[0].parameters()]))
    for at in ((1,0), (0,2)):
        a,opt = make()
        for e in range(2):
            for i,(xb,yb) in enumerate(dl):
                if (e,i)==at: add(a, opt)
                opt.zero_grad(); F.cross_entropy(a(xb), yb).backward(); opt.step()
        class Add(Callback):
            def before_batch(self, run):
                if (run.epoch,run.batch)==at: add(run.model, run.opt)
        b,opt = make(); fit(2, b, F.cross_entropy, opt, dl, cbs=Add(), **quiet)
        assert all(torch.allclose(p, q, atol=1e-6) for p,q in zip(a.parameters(), b.parameters()))

def test_rehearsal_takes_the_first_batch_that_counts_and_a_whole_epoch():
    def rate(p, y): k = y!=-100; return (p[k].argmax(1)==y[k]).sum().item()/int(k.sum())
    x,y = data(24); y[:4] = -100; dl = list(zip(x.split(4), y.split(4)))
    def count(yb): return (yb!=-100).sum()
    m = nn.Linear(6,3)
    got = fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), dl, dl, rate, count=count, **quiet)
    assert got==pytest.approx((F.cross_entropy(m(x), y).item(), rate(m(x), y)), abs=1e-5)
    train_dl = DataLoader(Dataset(*data(24)), 4)
    it = iter(train_dl)
    for _ in range(6): next(it)
    train_dl.load_state_dict(train_dl.state_dict())               # nothing is left of this epoch, but validation begins another
    T._rehearse(T.Run(1, m, F.cross_entropy, SGD(m.parameters(), .1), train_dl, train_dl))
    assert len(list(train_dl))==0 and len(list(train_dl))==6

def test_rehearsal_puts_back_the_models_own_generator():
    class Own(nn.Linear):
        def __init__(self): super().__init__(6,3); self.g = np.random.default_rng(0)
        def forward(self, x): return super().forward(x)*self.g.random()
    m = Own(); T._rehearse(T.Run(1, m, F.cross_entropy, SGD(m.parameters(), .1), [data(8)], [data(8)]))
    assert m.g.random()==np.random.default_rng(0).random()

def test_lists_are_joined_row_by_row():
    x,seen = torch.randn(24,6),[]
    def see(preds, yb): seen.append((len(preds), [len(t) for t in yb])); return 0.
    boxes = [torch.zeros(1+j%3,4) for j in range(24)]
    for bs in (8,7):
        dl = [(x[i:i+bs], boxes[i:i+bs]) for i in range(0,24,bs)]
        evaluate(nn.Linear(6,3), lambda p,yb: p.mean(), dl, whole(see))
        evaluate(nn.Linear(6,3), lambda p,yb: p.mean(), [(xb, [dict(b=b) for b in bb]) for xb,bb in dl], whole(see))
        assert seen==[(24,[1,2,3]*8), (24,[1]*24)]
        del seen[:]
    class Rows(nn.Module):
        def forward(self, x): return dict(rows=[r for r in x], sums=x.sum(1))
    got = predict(Rows(), x.split(5))
    assert torch.equal(torch.stack(got['rows']), x) and torch.equal(got['sums'], x.sum(1))
    class Heads(nn.Module):
        def forward(self, x): return [x,x]
    with pytest.raises(ValueError, match='list of 2 for 5 rows.*tuple or a dict'): predict(Heads(), x.split(5))
    with pytest.raises(ValueError, match='list of 2 for 8 rows'): evaluate(Heads(), lambda p,yb: p[0].mean(), [(x[:8],torch.zeros(8))], whole(see))
