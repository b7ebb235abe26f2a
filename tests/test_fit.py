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
        def forward(self, a, b): return dict(sum=a+b, parts=(a, [b[:,:2]]))
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
    no('the target should have a length', torch.utils.data.TensorDataset(x,y))       # a dataset in place of a loader
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
    for bad in (a,), [a], {'x':a}, a, 3, 'text', (a,b,3.), (a,b,None), (a,b,torch.tensor(1.)), (a,b,{'y':[1]}):
        m = Two()
        with pytest.raises(ValueError, match='inputs first and the target last'):
            fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), [bad], **quiet)

@pytest.mark.parametrize('pack', [lambda y,z: dict(y=y, z=z), lambda y,z: (y,z), lambda y,z: [dict(y=y), z]])
def test_nested_targets(pack):
    x,y = data(10); z = torch.randn(10,2)
    batches = [(x[i],pack(y[i],z[i])) for i in (slice(7),slice(7,10))]
    loss = lambda p,t: F.cross_entropy(p, tree_leaves(t)[0])
    m = nn.Linear(6,3)
    assert evaluate(m, loss, batches, ())==pytest.approx((F.cross_entropy(m(x), y).item(),), rel=1e-5)
    assert all(t.is_meta for t in tree_leaves(T._unpack(batches[0], torch.device('meta'))[:2]))

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
    class Freeze(Callback):
        def before_fit(self, run): assert run.model.training; run.model[1].eval()
    args = setup(); args[0].eval()
    was = args[0][1].running_mean.clone()
    fit(2, *args, [data()], cbs=Freeze(), **quiet)
    assert torch.equal(was, args[0][1].running_mean) and not args[0][1].training and args[0][3].training

def test_no_gradients_left():
    for cbs in Accumulate(4),At(3, lambda run: signal.raise_signal(signal.SIGINT)):
        m = nn.Linear(6,3)
        fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), (data(4) for _ in range(6)), cbs=cbs, **quiet)
        assert all(p.grad is None for p in m.parameters())

def test_ctrl_c(capsys):
    h = History()
    figs = fit(3, *setup(), cbs=[h, Stop(1,5)], **quiet)
    assert 'Interrupted in epoch 2 after batch 5' in capsys.readouterr().out
    assert len(h.rows)==1 and figs[0]==h.rows[0]['train_loss']
    assert all(math.isnan(f) for f in fit(3, *setup(), cbs=Stop(0,1), **quiet))

def test_ctrl_c_in_validation(capsys):
    class Valid:
        n = 0
        def __iter__(self):
            self.n += 1; yield data(10)
            if self.n==2: signal.raise_signal(signal.SIGINT)
            yield data(10)
    for epochs in 1,3:
        v,h = Valid(),History(); v.n = 2-min(epochs,2)
        res = fit(epochs, *setup(), v, cbs=h, **quiet)
        assert 'Interrupted' in capsys.readouterr().out
        if epochs==1: assert len(res)==2 and all(map(math.isnan, res))
        else: assert res==(h.rows[-1]['valid_loss'],h.rows[-1]['accuracy']) and len(h.rows)==1

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
    assert [*h.rows[0]]==['epoch','train_loss','train_accuracy','seconds']
    h.rows += [dict(epoch=2, train_loss=.5), dict(epoch=3, train_loss=.4, extra=2.)]
    lines = {l.get_label():[y for y in l.get_ydata() if not math.isnan(y)] for ax in h.plot() for l in ax.get_lines()}
    assert lines=={'train_loss':[h.rows[0]['train_loss'],.5,.4], 'train_accuracy':[h.rows[0]['train_accuracy']], 'extra':[2.]}

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
