"""Lesson 1's modules against autograd in float64, over shapes and depths, and what bad input gets"""
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
import minibatch.backprop as bp
from minibatch.backprop import *

sizes = st.integers(1,9)
quick = settings(deadline=None, max_examples=60)
def rand(*shape): return torch.randn(shape, dtype=torch.float64)
def grads(f, *ts):
    ts = [t.clone().requires_grad_() for t in ts]
    return torch.autograd.grad(f(*ts), ts)
def close(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

def make(widths, loss, seed):
    torch.manual_seed(seed)
    params = [p for i,o in zip(widths,widths[1:]) for p in (rand(i,o), rand(o))]
    lins = [Lin(w,b) for w,b in zip(params[::2],params[1::2])]
    return params, Model([m for l in lins for m in (l,Relu())][:-1], loss)
def torch_net(x, *params):
    for w,b in zip(params[:-2:2],params[1:-2:2]): x = F.relu(x@w+b)
    return x@params[-2]+params[-1]

def test_names(): assert set(bp.__all__)==set('lin relu mse lin_grad forward_and_backward Module Lin Relu Mse CrossEntropy Model'.split())

@quick
@given(n=sizes, widths=st.lists(sizes, min_size=2, max_size=5), ce=st.booleans(), seed=st.integers(0,999))
def test_any_depth(n, widths, ce, seed):
    params,model = make(widths, CrossEntropy() if ce else Mse(), seed)
    x,targ = rand(n,widths[0]), torch.randint(widths[-1],(n,)) if ce else rand(n,widths[-1])
    def loss(x, *params): return (F.cross_entropy if ce else F.mse_loss)(torch_net(x,*params), targ)
    for _ in range(2):                             # a second call starts afresh: gradients are replaced, not added to
        close(model(x,targ), loss(x,*params))
        model.backward()
        for t,g in zip([x,*params], grads(loss,x,*params)): close(t.g, g); assert t.g.shape==t.shape
    close(model.forward(x), torch_net(x,*params))

@quick
@given(n=sizes, n_in=sizes, nh=sizes, n_out=sizes, seed=st.integers(0,999), dtype=st.sampled_from([torch.float32,torch.float64]))
def test_function_and_classes_bit_for_bit(n, n_in, nh, n_out, seed, dtype):
    torch.manual_seed(seed)
    x,targ,*params = [torch.randn(s,dtype=dtype) for s in ((n,n_in),(n,n_out),(n_in,nh),(nh,),(nh,n_out),(n_out,))]
    loss = forward_and_backward(x,targ,*params)
    first = [t.g for t in (x,*params)]
    def f(x,w1,b1,w2,b2): return F.mse_loss((x@w1+b1).relu()@w2+b2, targ.double())
    if dtype==torch.float64:
        for a,b in zip(first, grads(f,x,*params)): close(a,b)
    model = Model([Lin(*params[:2]),Relu(),Lin(*params[2:])], Mse())
    assert model(x,targ).equal(loss)
    model.backward()
    for t,g in zip((x,*params),first): assert t.g is not g and t.g.equal(g) and g.dtype==dtype

def test_brute_force():
    "Every entry's slope by central differences; no relu switches, since no hidden value is near 0"
    params,model = make((3,4,2), CrossEntropy(), 3)
    x,targ = rand(5,3),torch.tensor([0,1,1,0,1])
    model(x,targ); model.backward()
    assert model.layers[0].out.abs().min()>1e-4
    for t in (x,*params):
        g,flat = t.g.flatten().clone(),t.view(-1)
        for i in range(len(flat)):
            old = flat[i].item()
            up,down = [(flat.__setitem__(i,old+h), model(x,targ).item())[1] for h in (1e-6,-1e-6)]
            flat[i] = old
            assert abs((up-down)/2e-6 - g[i])<1e-7

def test_intermediate_gradients():
    params,model = make((6,5,4), CrossEntropy(), 0)
    x,targ = rand(8,6),torch.arange(8)%4
    model(x,targ); model.backward()
    h = (x@params[0]+params[1]).requires_grad_(); a = h.relu(); o = a@params[2]+params[3]
    for l,g in zip(model.layers, torch.autograd.grad(F.cross_entropy(o,targ), (h,a,o))): close(l.out.g, g)

def test_relu_at_zero():
    x = torch.tensor([-1.,-0.,0.,1e-40,2.]).double(); r = Relu()
    r(x).g = torch.full((5,),3.).double(); r.backward()
    close(x.g, grads(lambda x: (F.relu(x)*3).sum(), x)[0]); assert x.g.tolist()==[0,0,0,3,3]

@quick
@given(n=sizes, c=sizes, scale=st.sampled_from([1e-3,1.,30.,1e4]), dtype=st.sampled_from([torch.uint8,torch.int8,torch.int32,torch.int64]), seed=st.integers(0,999))
def test_cross_entropy(n, c, scale, dtype, seed):
    torch.manual_seed(seed)
    z,targ,ce = rand(n,c)*scale,torch.randint(c,(n,)),CrossEntropy()
    close(ce(z,targ.to(dtype)), F.cross_entropy(z,targ)); ce.backward()
    close(z.g, grads(lambda z: F.cross_entropy(z,targ), z)[0])
    close(z.g.sum(1), torch.zeros(n).double())

def test_cross_entropy_masked_logits():
    z,targ,ce = rand(3,4),torch.tensor([0,1,2]),CrossEntropy()
    z[:,3] = -torch.inf
    close(ce(z,targ), F.cross_entropy(z,targ)); ce.backward()
    close(z.g, grads(lambda z: F.cross_entropy(z,targ), z)[0])
    assert ce(z,targ+1)==torch.inf

def test_training_is_torch_training():
    params,model = make((20,8,5), CrossEntropy(), 1)
    net = nn.Sequential(nn.Linear(20,8),nn.ReLU(),nn.Linear(8,5)).double()
    with torch.no_grad():
        for p,q in zip(net.parameters(),params): p.copy_(q.t())
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    x,y = rand(256,20),torch.randint(5,(256,))
    for i in range(200):
        xb,yb = x[i%8*32:][:32],y[i%8*32:][:32]
        ours,theirs = model(xb,yb),F.cross_entropy(net(xb),yb)
        close(ours, theirs.detach())
        model.backward()
        for p in params: p -= .1*p.g
        theirs.backward(); opt.step(); opt.zero_grad()
    for p,q in zip(net.parameters(),params): close(p.detach(), q.t())

def test_inp_g():
    (w,b),_ = make((3,2), Mse(), 0)
    x,targ = rand(4,3),rand(4,2)
    model = Model([Lin(w,b,inp_g=False)], Mse()); model(x,targ); model.backward()
    assert not hasattr(x,'g')
    for t,g in zip((w,b), grads(lambda w,b: F.mse_loss(x@w+b,targ), w,b)): close(t.g, g)

def test_no_autograd():
    params,model = make((4,3,2), CrossEntropy(), 0)
    with torch.inference_mode(): model(rand(5,4),torch.zeros(5).long()); model.backward()
    assert not any(p.g.requires_grad for p in params)

@pytest.mark.parametrize('x,w,b', [((),(3,2),(2,)), ((3,),(3,2),(2,)), ((5,3,3),(3,2),(2,)), ((5,4),(3,2),(2,)), ((5,3),(3,2),(1,)), ((5,3),(3,2),(5,2))])
def test_lin_shapes(x, w, b):
    with pytest.raises(ValueError) as e: lin(rand(*x),rand(*w),rand(*b))
    for s in (x,w,b,'one image'): assert str(s) in str(e.value)

@pytest.mark.parametrize('out,targ', [((4,1),(4,1)), ((4,1),(4,)), ((4,3),(4,3)), ((),()), ((4,),(4,))])
def test_mse_shapes(out, targ):
    out,targ = rand(*out),rand(*targ)
    close(mse(out,targ), F.mse_loss(out,targ.view_as(out)))
    m = Mse(); m(out,targ); m.backward()
    close(out.g, grads(lambda o: F.mse_loss(o,targ.view_as(o)), out)[0])

@pytest.mark.parametrize('out,targ', [((4,),(4,1)), ((4,3),(4,)), ((4,3),(4,1)), ((4,3),(3,)), ((),(4,)), ((4,1),(5,)), ((4,4),(4,))])
def test_mse_refuses_to_broadcast(out, targ):
    for f in (mse,Mse()):
        with pytest.raises(ValueError) as e: f(rand(*out),rand(*targ))
        assert str(out) in str(e.value) and str(targ) in str(e.value)

@pytest.mark.parametrize('shape,targ', [((3,5), torch.zeros(3)), ((3,5), torch.zeros(4).long()), ((3,5), torch.zeros(3,5).long()), ((3,5), torch.tensor(1))])
def test_cross_entropy_refuses(shape, targ):
    with pytest.raises(ValueError) as e: CrossEntropy()(rand(*shape),targ)
    for part in (tuple(targ.shape),targ.dtype,shape,'a class number for each row'): assert str(part) in str(e.value)

@pytest.mark.parametrize('bad', [5, -1, -100])
def test_no_such_class(bad): # PyTorch's gather says it
    with pytest.raises(RuntimeError, match=f'index {bad} is out of bounds'): CrossEntropy()(rand(3,5),torch.tensor([0,bad,1]))

def test_order_of_calls():
    params,model = make((3,4,2), CrossEntropy(), 0)
    for m in (*model.layers,model.loss):
        with pytest.raises(RuntimeError, match=rf'{type(m).__name__}.backward\(\): call it on a batch first'): m.backward()
    with pytest.raises(RuntimeError, match='CrossEntropy.backward.*on a batch first'): model.backward()
    x,y = rand(5,3),torch.tensor([0,1,0,1,0])
    model(x,y)
    with pytest.raises(RuntimeError, match='Lin.backward.*then backward of what follows'): model.layers[-1].backward()
    model.backward()
    model.forward(x)                               # new predictions, and no loss of them: the old gradients must not be used
    with pytest.raises(RuntimeError, match='then backward of what follows'): model.backward()

def test_a_failed_forward_changes_nothing():
    ce,z,y = CrossEntropy(),rand(2,3),torch.tensor([0,2]); ce(z,y)
    with pytest.raises(RuntimeError): ce(rand(2,3),torch.tensor([0,3]))
    ce.backward()
    close(z.g, grads(lambda z: F.cross_entropy(z,y), z)[0])

def test_a_module_twice():
    r = Relu()
    with pytest.raises(ValueError, match='twice'): Model([Lin(rand(3,3),rand(3)),r,Lin(rand(3,3),rand(3)),r], Mse())
