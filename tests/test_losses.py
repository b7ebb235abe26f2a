"The losses against PyTorch in float64: any shape, dim, dtype and magnitude; gradients of both orders; infinities; errors"
import pytest, torch, torch.nn.functional as F
from itertools import product
from hypothesis import given, settings, strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.testing import assert_close
from minibatch.losses import softmax, logsumexp, log_softmax, nll, cross_entropy

inf,nan = float('inf'),float('nan')
halves = torch.float16,torch.bfloat16
dtypes = torch.float64,torch.float32,*halves
ints = torch.uint8,torch.int8,torch.int16,torch.int32,torch.int64,torch.uint16,torch.uint32,torch.uint64
fuzz = settings(deadline=None, max_examples=150, derandomize=True)
maps = [(softmax, F.softmax), (log_softmax, F.log_softmax), (logsumexp, torch.logsumexp)]

def near(ours, exact, scale=0.):
    "`ours` has its dtype's precision, relative to `exact` or to the size `scale` of what went in"
    eps = torch.finfo(ours.dtype).eps
    exact = exact.to(ours.dtype).double()   # what a half precision cannot hold is inf there too
    assert_close(ours.double(), exact, rtol=16*eps, atol=16*eps*(1+scale), equal_nan=True)

@st.composite
def tensors(draw, min_dims=0, min_side=0, mags=(1., 30., 1e4)):
    "A random tensor of any shape, dtype and magnitude, sometimes not contiguous"
    shape = draw(st.lists(st.integers(min_side, 5), min_size=min_dims, max_size=4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=g, dtype=torch.float64)*draw(st.sampled_from(mags)) + draw(st.sampled_from((0., 0., 1e4, -1e4)))
    x = x.to(draw(st.sampled_from(dtypes)))
    return x.transpose(0, -1) if x.ndim>1 and draw(st.booleans()) else x

@st.composite
def problems(draw, min_dims=1):
    "Scores, and targets of a random integer type"
    x = draw(tensors(min_dims=min_dims))
    dim = min(x.ndim, 2)-1
    shape = x.shape[:dim]+x.shape[dim+1:]
    if not x.shape[dim]: x = x.new_zeros(*x.shape[:dim], 3, *x.shape[dim+1:])
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return x, torch.randint(0, x.shape[dim], shape, generator=g).to(draw(st.sampled_from(ints)))

def derivs(f, x, seed=0):
    "Value, gradient and gradient of the gradient of `f` at `x`, each for a fixed random direction"
    g = torch.Generator().manual_seed(seed)
    x = x.clone().requires_grad_()
    y = f(x)
    w,v = torch.randn(y.shape, generator=g, dtype=torch.float64),torch.randn(x.shape, generator=g, dtype=torch.float64)
    g1, = grad(y, x, w.to(y.dtype), create_graph=True)
    g2, = grad(g1, x, v.to(x.dtype))
    return y.detach(),g1.detach(),g2

@pytest.mark.parametrize('ours,theirs', maps)
@fuzz
@given(x=tensors(), data=st.data())
def test_maps(ours, theirs, x, data):
    dim = data.draw(st.integers(-max(x.ndim,1), max(x.ndim,1)-1))
    y,exact = ours(x, dim),theirs(x.double(), dim)
    assert y.dtype==x.dtype and y.shape==exact.shape
    near(y, exact)
    if ours is logsumexp: assert logsumexp(x, dim, keepdim=True).shape==x.logsumexp(dim, keepdim=True).shape

@pytest.mark.parametrize('ours,theirs', maps)
@fuzz
@given(x=tensors(min_dims=1, min_side=1), data=st.data())
def test_maps_derivs(ours, theirs, x, data):
    dim = data.draw(st.integers(-x.ndim, x.ndim-1))
    # in float64 PyTorch's own gradient of logsumexp, exp(x-lse), is no better than eps*|x|
    scale = 20+x.abs().max().item()*(ours is logsumexp and x.dtype==torch.float64)
    for a,b in zip(derivs(lambda x: ours(x, dim), x), derivs(lambda x: theirs(x, dim), x.double())): near(a, b, scale)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@fuzz
@given(xt=problems())
def test_cross_entropy(reduction, xt):
    x,t = xt
    ours   = derivs(lambda x: cross_entropy(x, t, reduction=reduction), x)
    theirs = derivs(lambda x: F.cross_entropy(x, t.long(), reduction=reduction), x.double())
    assert ours[0].dtype==x.dtype and ours[0].shape==theirs[0].shape
    for a,b in zip(ours, theirs): near(a, b, scale=20)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@fuzz
@given(xt=problems())
def test_nll(reduction, xt):
    x,t = xt
    y,exact = nll(x, t, reduction=reduction),F.nll_loss(x.double(), t.long(), reduction=reduction)
    assert y.dtype==x.dtype and y.shape==exact.shape
    near(y, exact, scale=x.double().abs().max().item() if x.numel() else 0)

rows = [[inf,0.,1.], [-inf,0.,1.], [-inf]*3, [inf,inf,0.], [inf,-inf,0.], [nan,0.,1.], [0.,-inf,-inf], [1e4,-1e4,0.]]

@pytest.mark.parametrize('dt', dtypes)
@pytest.mark.parametrize('row', rows)
def test_infinite(row, dt):
    x = torch.tensor([row,[0.,1.,2.]], dtype=dt)   # and an ordinary row, which must not notice
    fs = [(lambda x,f=f: f(x, -1), lambda x,g=g: g(x, -1)) for f,g in maps]
    fs += [(lambda x,t=t: cross_entropy(x, t, reduction='none'), lambda x,t=t: F.cross_entropy(x, t, reduction='none')) for t in torch.tensor([[0,0],[1,1],[2,2]])]
    for ours,theirs in fs:
        for a,b in zip(derivs(ours, x), derivs(theirs, x.double())): near(a, b, scale=20)

@pytest.mark.parametrize('n,c', [(0,10), (0,0)])
def test_empty(n, c):
    x,t = torch.zeros(n, c, requires_grad=True),torch.zeros(n).long()
    for r in 'mean','sum','none': assert_close(cross_entropy(x, t, reduction=r), F.cross_entropy(x, t, reduction=r), equal_nan=True)
    assert grad(cross_entropy(x, t, reduction='sum'), x)[0].shape==x.shape

@pytest.mark.parametrize('shape', [(4,), (3,4), (2,4,3), (2,3,2,2)])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_gradcheck(shape, reduction):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    t = torch.randint(0, 3, shape[:1]*(len(shape)>1)+shape[2:])
    f = lambda x: cross_entropy(x, t, reduction=reduction)
    assert gradcheck(f, x) and gradgradcheck(f, x)
    third = lambda x: grad(f(x).sum(), x, create_graph=True)[0]
    assert gradgradcheck(third, x)

def test_gradient_penalty():
    "The loss and its gradient together"
    torch.manual_seed(0)
    x,t = torch.randn(5, 4, dtype=torch.float64, requires_grad=True),torch.tensor([0,1,2,3,1])
    def penalised(ce):
        loss = ce(x, t)
        return grad(loss + grad(loss, x, create_graph=True)[0].pow(2).sum(), x)[0]
    assert_close(penalised(cross_entropy), penalised(F.cross_entropy))

@pytest.mark.parametrize('dt', halves)
def test_half_sums(dt):
    "Half precisions are summed in float32: many classes cost no digits and do not overflow"
    torch.manual_seed(0)
    x,t = torch.randn(4, 70_000).to(dt),torch.tensor([0,1,2,3])
    for f,g in *maps, (lambda x,_: cross_entropy(x, t, reduction='none'), lambda x,_: F.cross_entropy(x, t, reduction='none')):
        assert_close(f(x, -1).double(), g(x.double(), -1), rtol=torch.finfo(dt).eps, atol=2**-24)   # float16's smallest step

def test_backward_twice():
    x,t = torch.randn(3, 4, requires_grad=True),torch.tensor([0,1,3])
    loss = cross_entropy(x, t)
    a, = grad(loss, x, retain_graph=True)
    b, = grad(loss, x)
    assert torch.equal(a, b)   # nothing that was saved has been written over
    before = x.detach().clone()
    cross_entropy(x, t).backward()
    assert torch.equal(x.detach(), before)

def test_functorch():
    from torch.func import grad, vmap, jacrev, hessian, functional_call
    torch.manual_seed(0)
    x,t = torch.randn(5, 4, dtype=torch.float64),torch.randint(0, 4, (5,))
    for d in grad, lambda f: vmap(grad(f)), lambda f: jacrev(jacrev(f)), hessian:
        assert_close(d(cross_entropy)(x, t), d(F.cross_entropy)(x, t))
    net = torch.nn.Linear(4, 3).double()
    loss = lambda ce: lambda p: ce(functional_call(net, p, (x,)), t.clamp(max=2))
    params = dict(net.named_parameters())
    for a,b in zip(grad(loss(cross_entropy))(params).values(), grad(loss(F.cross_entropy))(params).values()): assert_close(a, b)

@pytest.mark.filterwarnings('ignore')
def test_compile():
    x,t = torch.randn(5, 4, dtype=torch.float64, requires_grad=True),torch.randint(0, 4, (5,))
    step = torch.compile(cross_entropy, fullgraph=True, backend='aot_eager')
    assert_close(step(x, t), F.cross_entropy(x, t))
    assert_close(grad(step(x, t), x), grad(F.cross_entropy(x, t), x))

@pytest.mark.parametrize('shape', [(4,), (6,4), (3,4,5), (2,4,3,2)])
@pytest.mark.parametrize('reduction,ignore_index,eps', list(product(['mean','sum','none'], [-100,2], [0,.1,1])))
def test_options(shape, reduction, ignore_index, eps):
    "All options at once, with no, some or all targets ignored: value, gradient and second gradient"
    torch.manual_seed(0)
    x,tshape = torch.randn(shape, dtype=torch.float64)*5,shape[:1]*(len(shape)>1)+shape[2:]
    for weight,share in product([None, torch.tensor([.5,2.,.1,3.], dtype=torch.float64)], [0,.4,1]):
        t = torch.randint(0, 4, tshape).masked_fill(torch.rand(tshape)<share, ignore_index)
        kw = dict(weight=weight, ignore_index=ignore_index, reduction=reduction)
        for ours,theirs in ((lambda x: cross_entropy(x, t, label_smoothing=eps, **kw), lambda x: F.cross_entropy(x, t, label_smoothing=eps, **kw)),
                            (lambda x: nll(x.log_softmax(min(x.ndim,2)-1), t, **kw), lambda x: F.nll_loss(x.log_softmax(min(x.ndim,2)-1), t, **kw))):
            for a,b in zip(derivs(ours, x), derivs(theirs, x)): assert_close(a, b, equal_nan=True)

def test_all_ignored_is_nan():
    x,t = torch.randn(3, 4),torch.full((3,), -100)
    assert cross_entropy(x, t).isnan() and cross_entropy(x, t, reduction='sum')==0

def test_ignored_rows_may_hold_anything():
    x,t = torch.tensor([[-inf,0.,1.], [nan,nan,nan], [0.,1.,2.]]),torch.tensor([0,1,2])
    for w in None,torch.tensor([1.,2.,3.]):
        assert_close(nll(x, t, w, ignore_index=0, reduction='none')[0], torch.tensor(0.))
        assert_close(cross_entropy(x[[0,2]], t[[0,2]], w, ignore_index=0), F.cross_entropy(x[2:], t[2:]))

@pytest.mark.parametrize('dt', [torch.uint8, torch.int8, torch.int16])
def test_ignore_index_of_narrow_labels(dt): # 255 is what masks hold in bytes
    v = torch.iinfo(dt).max
    x,t = torch.randn(5, 4),torch.tensor([0,v,3,v,1])
    assert_close(cross_entropy(x, t.to(dt), ignore_index=v), F.cross_entropy(x, t, ignore_index=v))

@pytest.mark.parametrize('dt', halves)
def test_options_in_half_precision(dt):
    torch.manual_seed(0)
    x,t,w = torch.randn(50, 4).to(dt),torch.randint(0, 4, (50,)),torch.rand(4)
    loss = cross_entropy(x, t, w, 2, label_smoothing=.1)
    assert loss.dtype==dt and nll(x, t, w).dtype==dt
    near(loss, F.cross_entropy(x.double(), t, w.double(), ignore_index=2, label_smoothing=.1))

x34,t3 = torch.zeros(3,4),torch.tensor([0,1,3])
bad = [
    (x34, torch.tensor([0,1,4]),        IndexError, r'target holds 4, but there are 4 classes: expected 0 to 3'),
    (x34, torch.tensor([0,-1,5]),       IndexError, r'target holds -1'),
    (x34, torch.tensor([0,-101,1]),     IndexError, r'target holds -101.*ignore_index'),
    (x34, torch.tensor([0,255,1]).byte(), IndexError, r'target holds 255'),
    (torch.zeros(2,3,2), torch.tensor([[0,1],[2,7]]), IndexError, r'target holds 7'),
    (torch.zeros(4), torch.tensor(9),   IndexError, r'target holds 9'),
    (torch.zeros(3,0), t3,              IndexError, r'there are 0 classes'),
    (x34, t3.float(),                   ValueError, r'torch.float32.*expected integers.*use target.long\(\)$'),
    (x34, F.one_hot(t3).float(),        ValueError, r'\(3, 4\).*argmax\(1\)$'),
    (x34, t3.bool(),                    ValueError, r'torch.bool.*target.long\(\)$'),
    (x34, t3[:2],                       ValueError, r'target has shape \(2,\).*input has shape \(3, 4\); expected integers of shape \(3,\), one class per row of scores$'),
    (x34, t3[:,None],                   ValueError, r'\(3, 1\).*integers of shape \(3,\).*use target.squeeze\(1\)$'),
    (x34, torch.tensor(1),              ValueError, r'target has shape \(\)'),
    (torch.zeros(2,4,5), t3,            ValueError, r'expected integers of shape \(2, 5\)'),
    (torch.tensor(1.), torch.tensor(0), ValueError, r'input has shape \(\).*\(C,\), \(N,C\)'),
    (t3, x34,                           ValueError, r'torch.int64'),
]

i = lambda *shape: torch.zeros(shape, dtype=torch.int64)
advice = [((8,10), i(8,1), 'target.squeeze(1)'), ((8,10), i(8,1).float(), 'target.squeeze(1)'), ((8,10), i(1,8), 'target.squeeze(0)'),
    ((1,10), i(1,1), 'target.squeeze(1)'), ((8,1), i(8,1), 'target.squeeze(1)'), ((2,10,4,4), i(2,1,4,4), 'target.squeeze(1)'), ((10,), i(1), 'target.squeeze(0)'),
    ((8,10), i(8,10), 'target.argmax(1)'), ((8,10), i(8,10).float(), 'target.argmax(1)'), ((8,10), i(8,10).bool(), 'target.long().argmax(1)'),
    ((10,), i(10), 'target.argmax(0)'), ((2,10,4,4), i(2,10,4,4), 'target.argmax(1)'),
    ((4,7,11), i(4,7), 'input.transpose(1,2)'), ((4,5,6,11), i(4,5,6), 'input.movedim(-1,1)'), ((8,10), i(8).double(), 'target.long()')]

@pytest.mark.parametrize('f', [nll, cross_entropy])
@pytest.mark.parametrize('shape,t,fix', advice)
def test_advice_is_right(f, shape, t, fix):
    "Each message names one remedy, and whoever follows it gets a loss (in one further step where the type is wrong too)"
    input,target = torch.randn(shape),t
    with pytest.raises(ValueError) as e: f(input, target)
    said = str(e.value).rsplit('use ', 1)[1]
    assert said==fix
    if fix.startswith('input'): input = eval(said)
    else: target = eval(said)
    f(input, target.long())

def test_integer_columns_never_hear_argmax():
    for n in 1,8:
        with pytest.raises(ValueError) as e: cross_entropy(torch.randn(n,10), i(n,1))
        assert 'argmax' not in str(e.value)

@pytest.mark.parametrize('f', [nll, cross_entropy])
@pytest.mark.parametrize('kw,msg', [(dict(weight=torch.ones(3)), r'weight is \(3,\).*\(4,\)'), (dict(weight=torch.ones(5)), r'\(5,\)'), (dict(weight='sum'), "'sum'.*one number per class"),
    (dict(weight=[1,2,3,4]), r'\[1, 2, 3, 4\]'), (dict(label_smoothing=1.5), 'label_smoothing is 1.5'), (dict(label_smoothing=nan), 'nan')])
def test_bad_options(f, kw, msg):
    with pytest.raises(ValueError, match=msg): f(x34, t3, **kw)

@pytest.mark.parametrize('f', [nll, cross_entropy])
@pytest.mark.parametrize('x,t,ex,msg', bad)
def test_errors(f, x, t, ex, msg):
    with pytest.raises(ex, match=msg): f(x, t)
    if x.is_floating_point():
        with pytest.raises(ex, match=msg): f(x.clone().requires_grad_(), t)

@fuzz
@given(xt=problems(), data=st.data())
def test_one_bad_target(xt, data):
    "One wrong label among good ones is always found, wherever it is"
    x,t = xt
    n = x.shape[min(x.ndim, 2)-1]
    if not t.numel() or not x.numel(): return
    t,i,v = t.long().contiguous(),data.draw(st.integers(0, t.numel()-1)),data.draw(st.sampled_from([-1, -101, n, n+1, 2**40]))
    t.view(-1)[i] = v
    for f in nll,cross_entropy:
        with pytest.raises(IndexError, match=f'target holds {v}, but there are {n} classes'): f(x, t)

@pytest.mark.parametrize('f', [nll, cross_entropy])
def test_reduction(f):
    with pytest.raises(ValueError, match="reduction is 'avg'; expected 'mean', 'sum' or 'none'"): f(x34, t3, reduction='avg')

@pytest.mark.parametrize('f', [softmax, log_softmax, logsumexp])
@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_no_scores(f, dtype):
    with pytest.raises(ValueError, match=f'{dtype}.*floating-point'): f(torch.ones(3).to(dtype))

@pytest.mark.parametrize('f', [nll, cross_entropy])
@pytest.mark.parametrize('target,why', [([0,1], 'list'), (torch.zeros(2, dtype=torch.complex64), 'complex64'), (torch.eye(2,3).long(), r'argmax\(1\)')])
def test_targets_that_are_no_labels(f, target, why):
    with pytest.raises(ValueError, match=why): f(torch.zeros(2,3), target)

def test_nll_gradient():
    x,y = torch.randn(7,5,2, dtype=torch.float64, requires_grad=True),torch.randint(5,(7,2))
    for r in ('mean','sum'):
        a,b = (torch.autograd.grad(g(x,y,reduction=r), x)[0] for g in (nll, torch.nn.functional.nll_loss))
        torch.testing.assert_close(a, b)
