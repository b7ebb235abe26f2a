"Models against nn.Sequential and nn.Module: outputs, gradients, keys; pickled, copied, moved, printed"
import copy, io, math, pickle
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from minibatch.models import *

LISTS = [RegisteredModel, SequentialModel]
KINDS = dict(linear=lambda: nn.Linear(6,6), relu=nn.ReLU, tanh=nn.Tanh, norm=lambda: nn.BatchNorm1d(6), drop=lambda: nn.Dropout(0.3),
             nested=lambda: nn.Sequential(nn.Linear(6,6), nn.ReLU()), ours=lambda: RegisteredModel([nn.Linear(6,6), nn.Tanh()]))

def grads(model, params, x, seed=3):
    torch.manual_seed(seed) # dropout
    x = x.clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *params])]

def assert_same(a, b):
    assert len(a)==len(b)
    for p,q in zip(a, b): torch.testing.assert_close(p, q, rtol=0, atol=1e-12)

def net(base, name): # the same net on DummyModule and on nn.Module
    def init(self):
        base.__init__(self)
        self.l1,self.act,self.l2 = nn.Linear(5,4),nn.ReLU(),nn.Linear(4,3)
    return type(name, (base,), dict(__init__=init, forward=lambda self,x: self.l2(self.act(self.l1(x))), __module__=__name__))

def nest(base, inner, name):
    def init(self):
        base.__init__(self)
        self.body,self.norm,self.lr = inner(),nn.BatchNorm1d(3),0.1
    return type(name, (base,), dict(__init__=init, forward=lambda self,x: self.norm(self.body(x)), __module__=__name__))

DummyNet,Net   = net(DummyModule, 'DummyNet'),net(nn.Module, 'Net')
DummyNest,Nest = nest(DummyModule, DummyNet, 'DummyNest'),nest(nn.Module, Net, 'Nest')

@settings(deadline=None, max_examples=60)
@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=7), share=st.booleans(), training=st.booleans(), seed=st.integers(0,2**31))
def test_like_sequential(kinds, share, training, seed):
    torch.manual_seed(seed)
    layers = [KINDS[k]().double() for k in kinds]
    if share: layers += layers[:2]           # the same objects once more
    want = nn.Sequential(*layers).train(training)
    x,params = torch.randn(8,6,dtype=torch.float64),list(want.parameters())
    start = copy.deepcopy(want.state_dict())
    ref = grads(want, params, x)
    for cls in [*LISTS, ListModel]:
        model = cls(layers)
        want.load_state_dict(start)          # BatchNorm's averages have moved
        assert_same(grads(model, params, x), ref)
        if cls is ListModel: assert not list(model.parameters()) and not model.state_dict()
        else:
            assert [id(p) for p in model.parameters()]==[id(p) for p in params]
            assert list(model.state_dict())==list(start)
            if cls is RegisteredModel: assert repr(model).replace(cls.__name__, 'Sequential', 1)==repr(want) # ModuleList sums up repeats

def layers(): return [nn.Linear(6,5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5,3)]

@pytest.mark.parametrize('cls', LISTS)
def test_weights_travel_both_ways(cls):
    seq,model,x = nn.Sequential(*layers()).eval(),cls(layers()).eval(),torch.randn(4,6)
    model.load_state_dict(seq.state_dict())
    assert model(x).equal(seq(x))
    again = nn.Sequential(*layers()).eval()
    again.load_state_dict(model.state_dict())
    assert again(x).equal(seq(x))
    with pytest.raises(RuntimeError, match='size mismatch'): model.load_state_dict(cls([nn.Linear(6,4), *layers()[1:]]).state_dict())

@pytest.mark.parametrize('make', [*(lambda c=c: c(layers()) for c in [*LISTS, ListModel]), DummyNest, lambda: mlp(6,5,3), lambda: cnn(3), lambda: get_model(6,5,3)[0]])
@pytest.mark.parametrize('how', ['pickle', 'deepcopy', 'torch.save'])
def test_copies(make, how):
    torch.manual_seed(0)
    model = make()
    x = torch.randn(4, 784 if 'Conv2d' in repr(model) else 5 if isinstance(model, DummyNest) else 6)
    if how=='pickle': twin = pickle.loads(pickle.dumps(model))
    elif how=='deepcopy': twin = copy.deepcopy(model)
    else:
        f = io.BytesIO(); torch.save(model, f); f.seek(0)
        twin = torch.load(f, weights_only=False)
    torch.manual_seed(1); a = model(x)
    torch.manual_seed(1); b = twin(x)
    assert a.equal(b) and type(twin) is type(model) and repr(twin)==repr(model)
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in twin.parameters()}      # a copy, not the same memory
    ours,theirs = list(model.parameters()),list(twin.parameters())   # and what is registered is what runs
    twin(x).sum().backward()
    assert all(p.grad is not None for p in theirs) and all(p.grad is None for p in ours)

DEVICES = ['meta', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('make', [*(lambda c=c: c(layers()) for c in LISTS), DummyNest, lambda: mlp(6,5,3), lambda: cnn(3)])
def test_moves(make, device):
    model = make()
    assert model.to(device) is model
    assert {t.device.type for t in model.state_dict().values()}=={device}
    assert {p.dtype for p in make().to(torch.float64).parameters()}=={torch.float64}
    x = torch.randn(4, 784 if 'Conv2d' in repr(model) else 5 if isinstance(model, DummyNest) else 6, device=device)
    assert model(x).device.type==device and model(x).shape==(4,3)

def test_list_model_is_left_behind():
    model = ListModel(layers()).double().to('meta').eval()
    assert model.layers[0].weight.device.type=='cpu' and model.layers[0].weight.dtype==torch.float32 and model.layers[3].training
    with pytest.raises(ValueError, match='empty parameter list'): torch.optim.SGD(model.parameters(), lr=0.1)
    assert ListModel([torch.sin, lambda x: x+1])(torch.zeros(2)).tolist()==[1,1]     # functions will do

@pytest.mark.parametrize('cls', LISTS)
def test_registered_models_are_reached(cls):
    model = cls(layers()).eval()
    assert not any(m.training for m in model.modules())
    model.add_module('0', nn.Linear(6,5,bias=False))
    assert '0.bias' not in model.state_dict() and model(torch.randn(2,6)).shape==(2,3) # the layer that runs is the one that is registered
    seen = []
    for m in model.children(): m.register_forward_hook(lambda m,i,o: seen.append(type(m).__name__))
    model(torch.randn(2,6))
    assert seen==['Linear','BatchNorm1d','ReLU','Dropout','Linear']

@pytest.mark.parametrize('bad', [5, [nn.Linear(2,2), torch.relu], ['relu'], {'relu':nn.ReLU()}])
@pytest.mark.parametrize('cls', LISTS)
def test_only_modules_can_be_registered(cls, bad):
    with pytest.raises(TypeError): cls(bad)

def pair(ours, theirs):
    torch.manual_seed(0); a = ours()
    torch.manual_seed(0); b = theirs()
    return a,b

@pytest.mark.parametrize('ours,theirs', [(DummyNet,Net), (DummyNest,Nest)])
def test_dummy_module_like_nn_module(ours, theirs):
    a,b = pair(ours, theirs)
    a.to(torch.float64); b.to(torch.float64)
    assert list(a.state_dict())==list(b.state_dict()) and repr(a).replace('Dummy','')==repr(b)
    assert [k for k,_ in a.named_children()]==[k for k,_ in b.named_children()]
    assert [p.shape for p in a.parameters()]==[p.shape for p in b.parameters()]
    x = torch.randn(6,5,dtype=torch.float64)
    assert_same(grads(a, list(a.parameters()), x), grads(b, list(b.parameters()), x))
    opt_a,opt_b = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (a,b)]
    for m,opt in ((a,opt_a), (b,opt_b)):
        for _ in range(5):
            opt.zero_grad(); m(x).square().sum().backward(); opt.step()
    assert_same(list(a.parameters()), list(b.parameters()))
    c = theirs().to(torch.float64)
    c.load_state_dict(a.state_dict()); a2 = ours().to(torch.float64); a2.load_state_dict(c.state_dict())
    assert_same(list(a2.state_dict().values()), list(b.state_dict().values()))

def test_dummy_registration():
    for base in (DummyModule, nn.Module):
        m = base()
        assert repr(m)==f'{base.__name__}()'
        m.a,m.n,m.b = nn.Linear(2,2),3,nn.ReLU()
        m.c = m.a                                                 # one layer under two names
        assert len(list(m.parameters()))==2 and list(m.state_dict())==['a.weight','a.bias','c.weight','c.bias']
        m.a = nn.Linear(2,3); assert list(m.state_dict())[:2]==['a.weight','a.bias'] and m.state_dict()['a.weight'].shape==(3,2)
        del m.c, m.b
        assert [k for k,_ in m.named_children()]==['a'] and not hasattr(m, 'b') and m.n==3
        m.a = None                                                # a layer no more
        assert not list(m.parameters()) and not m.state_dict()

def test_dummy_errors():
    class Forgot(DummyModule):
        def __init__(self): self.l = nn.Linear(2,2)
    with pytest.raises(AttributeError, match="'Forgot'.*_modules"): Forgot()
    m = DummyNet(); sd = m.state_dict()
    for bad in ({}, {**sd, 'l3.weight':torch.ones(1)}, {k:v for k,v in sd.items() if k!='l2.bias'}):
        with pytest.raises(KeyError, match='l2.bias'): m.load_state_dict(bad)
    with pytest.raises(RuntimeError, match='size mismatch'): m.load_state_dict({**sd, 'l1.bias':torch.ones(1)})
    with pytest.raises(AttributeError): m.nothing

def ref_mlp(n_in, nh, n_out): return nn.Sequential(nn.Linear(n_in,nh), nn.ReLU(), nn.Linear(nh,n_out))
class RefCNN(nn.Module): # written out, with F
    def __init__(self, n_out):
        super().__init__()
        self.c1,self.c2,self.l1,self.l2 = nn.Conv2d(1,32,3),nn.Conv2d(32,64,3),nn.Linear(9216,128),nn.Linear(128,n_out)
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.c2(F.relu(self.c1(x.reshape(-1,1,28,28))))), 2)
        x = F.dropout(x, 0.25, self.training).flatten(1)
        return self.l2(F.dropout(F.relu(self.l1(x)), 0.5, self.training))

def test_mlp():
    a,b = pair(lambda: mlp(20,7,3), lambda: ref_mlp(20,7,3))
    assert type(a) is nn.Sequential and list(a.state_dict())==list(b.state_dict()) and repr(a)==repr(b)
    a.double(); b.double()
    x = torch.randn(9,20,dtype=torch.float64)
    assert_same(grads(a, list(a.parameters()), x), grads(b, list(b.parameters()), x))

@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('shape', [(784,), (28,28), (1,28,28)])
def test_cnn(training, shape):
    a,b = pair(lambda: cnn(7), lambda: RefCNN(7))
    a.double().train(training); b.double().train(training)
    x = torch.rand(3,*shape,dtype=torch.float64)
    assert a(x).shape==(3,7) and type(a) is nn.Sequential
    assert_same(grads(a, list(a.parameters()), x), grads(b, list(b.parameters()), x))
    assert list(a.state_dict())==[f'{i}.{k}' for i in (2,4,9,12) for k in ('weight','bias')]
    assert sum(p.numel() for p in a.parameters())==320+18496+1179776+1290-3*129

def test_cnn_says_what_does_not_fit():
    with pytest.raises(RuntimeError, match='783'): cnn(10)(torch.rand(2,783))

def test_get_model():
    (model,opt),ref = pair(get_model, lambda: ref_mlp(784,50,10))
    assert_same(list(model.parameters()), list(ref.parameters()))
    assert [id(p) for g in opt.param_groups for p in g['params']]==[id(p) for p in model.parameters()]
    assert opt.param_groups[0]['lr']==0.1 and opt.param_groups[0]['momentum']==0
    x,y,start = torch.randn(64,784),torch.randint(0,10,(64,)),copy.deepcopy(ref)
    for m in (model,ref): F.cross_entropy(m(x), y).backward()
    opt.step()
    torch.testing.assert_close(list(model.parameters()), [p-0.1*p.grad for p in ref.parameters()])
    model,opt = get_model(6,5,3,lr=0.5)
    assert model(torch.randn(2,6)).shape==(2,3) and opt.param_groups[0]['lr']==0.5

@pytest.mark.parametrize('lr', [-0.1, math.nan, math.inf])
def test_get_model_refuses(lr):
    with pytest.raises(ValueError, match=f'lr must be finite and at least 0; got {lr}'): get_model(lr=lr)
