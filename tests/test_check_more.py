"What `check` says of attempts at optimizers, loops, data, callbacks and the exercises of the later lessons"
import copy, gzip, io, json, math, os, pickletools, random, re, shutil, struct, zipfile
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from minibatch import check
from minibatch.check import Raised, Wrong, pieces
from minibatch.checkpoint import Checkpoint
from minibatch.models import cnn
from minibatch.training import Callback

ROOT = Path(__file__).parents[1]

def message(name, version):
    with pytest.raises(Wrong) as e: pieces[name](version)
    return str(e.value)

# ---- optimizers

class Sgd:
    def __init__(self, params, lr, momentum=0, weight_decay=0):
        self.ps,self.lr,self.momentum,self.wd = list(params),lr,momentum,weight_decay
        self.param_groups,self.bufs = [dict(params=self.ps, lr=lr)],[None]*len(self.ps)
    def now(self): return self.param_groups[0]['lr']
    def move(self, i, p, g):
        self.bufs[i] = g.clone() if self.bufs[i] is None else self.momentum*self.bufs[i] + g
        p -= self.now()*self.bufs[i]
    @torch.no_grad()
    def step(self):
        for i,p in enumerate(self.ps):
            if p.grad is not None: self.move(i, p, p.grad + self.wd*p if self.wd else p.grad)
    def zero_grad(self):
        for p in self.ps:
            if p.grad is not None: p.grad.zero_()

class Fixed(Sgd):
    def now(self): return self.lr
class Alias(Sgd):
    def move(self, i, p, g):
        self.bufs[i] = g if self.bufs[i] is None else self.momentum*self.bufs[i] + g
        p -= self.now()*self.bufs[i]
class Decoupled(Sgd):
    @torch.no_grad()
    def step(self):
        for i,p in enumerate(self.ps):
            if p.grad is None: continue
            p *= 1-self.now()*self.wd
            self.move(i, p, p.grad)
class LrInside(Sgd):
    def move(self, i, p, g):
        self.bufs[i] = (0 if self.bufs[i] is None else self.momentum*self.bufs[i]) - self.now()*g
        p += self.bufs[i]
class NewTensor(Sgd):
    def move(self, i, p, g):
        self.bufs[i] = g.clone() if self.bufs[i] is None else self.momentum*self.bufs[i] + g
        p = p - self.now()*self.bufs[i]
class Recorded(Sgd):
    def step(self):
        for i,p in enumerate(self.ps):
            if p.grad is not None: self.move(i, p, p.grad + self.wd*p)
class NeverZero(Sgd):
    def zero_grad(self): pass
class FirstOnly(Sgd):
    @torch.no_grad()
    def step(self):
        for i,p in enumerate(self.ps):
            if p.grad is None: continue
            self.move(i, p, p.grad + self.wd*p if self.wd and self.bufs[i] is None else p.grad)
class OneBuffer(Sgd):
    buf = 0
    def move(self, i, p, g):
        self.buf = self.momentum*self.buf + g
        p -= self.now()*self.buf

@pytest.mark.parametrize('f,says', [(Fixed,'remembered from the beginning'), (Alias,'`p.grad` itself'), (Decoupled,'goes by the momentum'),
    (LrInside,'inside the momentum buffer'), (NewTensor,'makes a new tensor'), (Recorded,'@torch.no_grad()'), (NeverZero,'does not forget the gradients'),
    (FirstOnly,'in the first step only'), (OneBuffer,'share one momentum buffer')])
def test_sgd(f, says): assert says in message('SGD', f)

def test_the_case_says_that_the_rate_changes():
    text = message('Optimizer', type('O', (), dict(
        __init__=lambda self,params,lr: vars(self).update(ps=[*params], lr=lr, first=lr),
        step=lambda self: [p.data.sub_(self.first*p.grad) for p in self.ps if p.grad is not None],
        zero_grad=lambda self: [setattr(p, 'grad', None) for p in self.ps])))
    assert re.search(r'lr_from_step_3 +0\.025', text) and 'a schedule changes nothing' in text

# ---- lessons 3 and 4

def in_uint8(out, yb):
    n = torch.tensor(0, dtype=torch.uint8)
    for o,y in zip(out, yb): n += o.argmax()==y
    return n/len(yb)

@pytest.mark.parametrize('f,says', [(lambda out,yb: (out.argmax()==yb).float().mean(), '`argmax()` without'), (in_uint8, 'uint8'),
    (lambda out,yb: (out.argmax(0)==yb).float().mean(), 'along the batch'), (lambda out,yb: (out.argmax(1)==yb).sum()//len(yb), '`//` drops'),
    (lambda out,yb: (out.argmax(1, keepdim=True)==yb).float().mean(), 'each of n guesses with each of n labels')])
def test_accuracy(f, says): assert says in message('accuracy', f)

class Dummy:
    def __init__(self): vars(self)['_modules'] = {}
    def __setattr__(self, k, v):
        if self.is_layer(v): self._modules[k] = v
        else: self._modules.pop(k, None)
        vars(self)[k] = v
    def is_layer(self, v): return isinstance(v, nn.Module)
    def parameters(self):
        seen = set()
        for p in (p for m in self._modules.values() for p in m.parameters()):
            if id(p) not in seen: yield p
            seen.add(id(p))
class Twice(Dummy):
    def parameters(self):
        for m in self._modules.values(): yield from m.parameters()
class Linears(Dummy):
    def is_layer(self, v): return type(v) is nn.Linear
class Shallow(Dummy):
    def parameters(self):
        ps = [getattr(m, k) for m in self._modules.values() for k in ('weight','bias') if hasattr(m, k)]
        return [*dict.fromkeys(ps)]
class Shared(Dummy):
    modules = {}
    def __init__(self): vars(self)['_modules'] = self.modules

@pytest.mark.parametrize('f,says', [(Twice,'an optimizer would move them twice'), (Linears,'only linear layers'),
    (Shallow,'not what is in layers inside them'), (Shared,'share one dict')])
def test_dummy_module(f, says):
    for _ in range(2): assert says in message('DummyModule', f)

def one_batch(xb, yb, model, loss_func, opt):
    loss_func(model(xb), yb).backward()
    opt.step()
    opt.zero_grad()
def returns(epochs, model, loss_func, opt, batches):
    for _ in range(epochs):
        for b in batches: return one_batch(*b, model, loss_func, opt)
def returns_after_one(epochs, model, loss_func, opt, batches):
    for _ in range(epochs):
        for b in batches: one_batch(*b, model, loss_func, opt)
        return model
def stays_in_eval(epochs, model, loss_func, opt, batches):
    for _ in range(epochs):
        for b in batches: one_batch(*b, model, loss_func, opt)
        model.eval()
def early_step(epochs, model, loss_func, opt, batches):
    for _ in range(epochs):
        for xb,yb in batches:
            opt.zero_grad()
            loss = loss_func(model(xb), yb)
            opt.step()
            loss.backward()
def with_accuracy(epochs, model, loss_func, opt, batches):
    for _ in range(epochs):
        model.train()
        for b in batches: one_batch(*b, model, loss_func, opt)
        model.eval()
        with torch.no_grad(): [model(xb) for xb,_ in batches]

@pytest.mark.parametrize('f,says', [(returns,'ends after the first step'), (returns_after_one,'only the first epoch'),
    (stays_in_eval,'`model.train()` at the beginning of each epoch'), (early_step,'first `backward()`, then `opt.step()`')])
def test_loop(f, says): assert says in message('loop', f)

def test_validation_in_training_mode():
    def fit(epochs, model, loss_func, opt, train_dl, valid_dl, progress=True, grad=torch.no_grad):
        for _ in range(epochs):
            model.train()
            for b in train_dl: one_batch(*b, model, loss_func, opt)
            with grad(): [model(xb) for xb,_ in valid_dl]
    assert 'batch normalization learns from it' in message('fit', fit)
    def recorded(*args, progress):
        with_accuracy(*args[:-1])
        for xb,_ in args[-1]: args[1](xb)
    assert 'recorded in validation' in message('fit', recorded)

# ---- data

class Order:
    def __init__(self, ds, bs, shuffle=False): self.ds,self.n,self.bs,self.shuffle = ds,len(ds),bs,shuffle
    def order(self): return torch.randperm(self.n) if self.shuffle else torch.arange(self.n)
    def starts(self): return range(0, self.n, self.bs)
    def __iter__(self):
        o = self.order()
        for i in self.starts(): yield o[i:i+self.bs]
class Seeded(Order):
    def order(self): torch.manual_seed(1); return super().order()
class OneMore(Order):
    def starts(self): return range(0, self.n+1, self.bs)
class Shrinking(Order):
    def __iter__(self):
        o = self.order()
        for i in self.starts(): yield o[i:self.bs]

@pytest.mark.parametrize('f,says', [(Seeded,'without `manual_seed`'), (OneMore,'a batch of nothing'), (Shrinking,'not `order[i:bs]`')])
def test_sampler(f, says): assert says in message('Sampler', f)

class Loader(Order):
    def __len__(self): return math.ceil(self.n/self.bs)
    def __iter__(self): return (self.batch(*self.ds[o]) for o in super().__iter__())
    def batch(self, x, y): return x,y
class LastFull(Loader):
    def __iter__(self):
        o = self.order()
        for i in self.starts(): yield self.ds[o[i:i+self.bs] if i+self.bs<=self.n else o[-self.bs:]]
class Apart(Loader):
    def __iter__(self): return ((x,y) for (x,_),(_,y) in zip(super().__iter__(), super().__iter__()))
def generator(ds, bs, shuffle=False): yield from Loader(ds, bs, shuffle)

@pytest.mark.parametrize('f,says', [(LastFull,'rows of the batch before it'), (Apart,'an order of its own'), (generator,'nothing in the second epoch'),
    (type('_', (Loader,OneMore), {}),'a batch of nothing'), (type('_', (Loader,), dict(__len__=None)),'there is no `__len__`'),
    (type('_', (Loader,), dict(batch=lambda self,x,y: dict(x=x, y=y))), 'one dict'),
    (type('_', (Loader,), dict(batch=lambda self,x,y: (x,y,len(y)))), 'a tuple of 3: Tensor, Tensor, int'),
    (type('_', (Loader,), dict(batch=lambda self,x,y: (x,y[:,None]))), 'shapes of the first batch')])
def test_dataloader(f, says): assert says in message('DataLoader', f)

def test_the_loader_says_that_its_length_is_asked_for(): assert '`len(dl)`' in check.DataLoader.__doc__

def test_predict():
    def predict(model, dl, end=lambda p: p):
        model.eval()
        with torch.no_grad(): p = torch.cat([model(xb) for xb,_ in dl])
        model.train()
        return end(p)
    check.predict(predict)
    assert 'a softmax makes' in message('predict', lambda *args: predict(*args, lambda p: p.softmax(1)))
    assert 'a softmax of a softmax' in message('predict', lambda *args: predict(*args, lambda p: p.softmax(1).softmax(1)))

# ---- the exercises of lessons 8 to 13 and of appendix 0

class Norms(Callback):
    order = -1
    def __init__(self): self.norms = []
    def after_backward(self, run):
        self.norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in run.model.parameters() if p.grad is not None)))
class NormsAtZero(Norms): order = 0

class Best(Callback):
    def __init__(self, path): self.path,self.best = str(path),1e9
    def after_epoch(self, run):
        if run.figures[0]>=self.best: return
        self.best = run.figures[0]
        self.write(run.model.state_dict())
    def write(self, state):
        torch.save(state, self.path+'.new')
        os.replace(self.path+'.new', self.path)
class BestInPlace(Best):
    def write(self, state): torch.save(state, self.path)
class BestAtEnd(Best):
    def write(self, state): self.state = state
    def after_fit(self, run): torch.save(self.state, self.path)

class Ema(Callback):
    def __init__(self, d): self.d = d
    def before_fit(self, run):
        self.model = run.model
        self.e = {k:v.clone() for k,v in run.model.state_dict().items()}
    def after_batch(self, run):
        if self.due(run):
            for k,v in self.model.state_dict().items(): self.e[k] = self.d*self.e[k] + (1-self.d)*v
    def due(self, run): return run.update
    def swap(self):
        now = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.e)
        self.e = now
class EmaAlways(Ema):
    def due(self, run): return True

class Mix(Callback):
    def __init__(self, a): self.a = a
    def share(self, x): return np.random.beta(self.a, self.a)
    def before_batch(self, run):
        x,y = run.xb[0],torch.eye(10)[run.yb]
        s,i = self.share(x),torch.randperm(len(x))
        run.xb[0],run.yb = s*x + (1-s)*x[i],self.targets(s*y + (1-s)*y[i], y)
    def targets(self, mixed, y): return mixed
class MixEach(Mix):
    def share(self, x): return torch.distributions.Beta(self.a, self.a).sample((len(x),1))
class MixLarger(Mix):
    def share(self, x): return max(s := np.random.beta(self.a, self.a), 1-s)
class MixInputs(Mix):
    def targets(self, mixed, y): return y
class MixUniform(Mix):
    def share(self, x): return random.random()

class Noise(Callback):
    def __init__(self, seed=3): self.g = torch.Generator().manual_seed(seed)
    def before_batch(self, run): run.xb = [x + torch.rand(x.shape, generator=self.g) for x in run.xb]
    def state_dict(self): return dict(rng=self.g.get_state().tolist())
    def load_state_dict(self, s): self.g.set_state(torch.tensor(s['rng'], dtype=torch.uint8))
class NoiseNoState(Noise): state_dict = load_state_dict = property()
class NoiseShared(Noise):
    def before_batch(self, run): run.xb = [x + torch.rand_like(x) for x in run.xb]
    def state_dict(self): return dict(rng=torch.get_rng_state())
    def load_state_dict(self, s): torch.set_rng_state(s['rng'])

class Kept(Checkpoint):
    def __init__(self, path, n): super().__init__(path); self.n,self.names = n,[]
    def after_epoch(self, run):
        self.save(run)
        self.names.append(shutil.copy(self.path, f'{self.path}.{run.epoch}'))
        while len(self.names)>self.n: os.remove(self.names.pop(0))

def sure_by_loop(a, b):
    wins = 0
    for _ in range(1000): wins += np.median(np.random.choice(a, len(a)))<np.median(np.random.choice(b, len(b)))
    return wins>=990

def ensemble(nets, xb, **kw):
    ps,bufs = stack_module_state(nets)
    return vmap(lambda p,b: functional_call(nets[0], (p,b), (xb,)), **kw)(ps, bufs)

def idx_by_hand(a, path):
    with (gzip.open if str(path).endswith('.gz') else open)(path, 'wb') as f:
        f.write(bytes([0,0,8,a.ndim]))
        for n in a.shape: f.write(n.to_bytes(4, 'big'))
        f.write(bytes(a.reshape(-1)))
def idx_little(a, path):
    path.write_bytes(struct.pack(f'<4B{a.ndim}I', 0, 0, 8, a.ndim, *a.shape) + a.tobytes())

def names(path):
    out,strings = [],[]
    for op,arg,_ in pickletools.genops(path.read_bytes()):
        if 'UNICODE' in op.name: strings.append(arg)
        if op.name=='GLOBAL': out.append(arg)
        if op.name=='STACK_GLOBAL': out.append(f'{strings[-2]} {strings[-1]}')
    return out

def is_npz(path):
    b = path.read_bytes()
    try: b = gzip.decompress(b)
    except OSError: pass
    return zipfile.is_zipfile(io.BytesIO(b))

@pytest.mark.parametrize('name,f', [('SGD',Sgd), ('DummyModule',Dummy), ('loop',with_accuracy), ('Sampler',Order), ('DataLoader',Loader), ('GradNorm',Norms),
    ('BestFile',Best), ('EMA',Ema), ('Mixup',Mix), ('Mixup',MixEach), ('Mixup',MixLarger), ('Jitter',Noise), ('Keep',Kept), ('sure',sure_by_loop),
    ('ensemble',ensemble), ('write_idx',idx_by_hand), ('names_in',names), ('is_npz',is_npz),
    ('cnn_cost',lambda n: n*(2*2*26*26*9*32 + 3*2*(24*24*288*64 + 9216*128 + 1280)))])
def test_right_versions_written_otherwise(name, f): pieces[name](f)

@pytest.mark.parametrize('name,f,says', [('GradNorm',NormsAtZero,'its place in `cbs` decides'), ('BestFile',BestInPlace,'then `os.replace`'),
    ('BestFile',BestAtEnd,'when all is over'), ('EMA',EmaAlways,'`if run.update`'), ('Mixup',MixInputs,'the targets are not'),
    ('Mixup',MixUniform,'all alike likely'), ('Jitter',NoiseNoState,'it has no state'), ('Jitter',NoiseShared,'that all share'),
    ('sure',lambda a,b: sorted(a)[25]<sorted(b)[25],'compared once'), ('cnn_cost',lambda n: 3*2*n*(26*26*9*32 + 24*24*288*64 + 9216*128 + 1280),
     'nobody asks for the gradient of the images'), ('ensemble',lambda nets,xb: ensemble(nets, xb, out_dims=1),'the second dimension'),
    ('write_idx',idx_little,'dimensions'), ('names_in',lambda path: {*names(path)},'a set'), ('is_npz',lambda path: path.read_bytes()[:4]==b'PK\3\4','not unpacked')])
def test_wrong_versions(name, f, says): assert says in message(name, f)

def test_the_cost_of_cnn_is_what_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter: cnn(10)(torch.rand(3,784)).sum().backward()
    assert check.cnn_cost.ref(3)==counter.get_total_flops()

def test_a_pickle_that_is_loaded_is_noticed():
    import pickle
    def loads(path): pickle.loads(path.read_bytes()); return names(path)
    assert 'is the pickle run?' in message('names_in', loads)

def test_no_random_state_and_no_file_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3); np.random.seed(4); random.seed(5)
    before = torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate()
    for name,f in dict(BestFile=Best, Mixup=Mix, Jitter=NoiseShared, Keep=Kept, sure=sure_by_loop, write_idx=idx_by_hand).items():
        try: pieces[name](f)
        except Wrong: pass
    assert torch.get_rng_state().equal(before[0]) and (np.random.get_state()[1]==before[1]).all() and random.getstate()==before[2]
    assert not [*tmp_path.iterdir()]

def test_each_exercise_with_a_check_stands_in_its_lesson_and_is_solved():
    for p in pieces.values():
        if ', exercise ' not in p.read: continue
        kind,n = p.read.split(',')[0].split()
        for folder in 'nbs','nbs/solutions':
            path = next((ROOT/folder).glob(f'{int(n):02}_*.ipynb' if kind=='lesson' else f'a{n}_*.ipynb'))
            text = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'])
            assert f'check.{p.name}({p.name})' in text, (p.name, path)
