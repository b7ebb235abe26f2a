"The optimizer against torch.optim.SGD, and against bad input"
import copy, io, math, pickle, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim import lr_scheduler as ls
from minibatch.optim import Optimizer, SGD

T = torch.optim.SGD
def leaf(*shape, dtype=torch.float64): return torch.randn(shape, dtype=dtype).requires_grad_()
def twins(n, dtype=torch.float64):
    ps = [leaf(*[(3,2),(4,),(),(0,3)][i%4], dtype=dtype) for i in range(n)]
    return ps, [p.detach().clone().requires_grad_() for p in ps]
def same(ps, qs, tol=0):
    for p,q in zip(ps,qs): torch.testing.assert_close(p, q, rtol=tol, atol=tol, equal_nan=True)
def grads(*lists, skip=()): # the same random gradients for all lists; those in `skip` get none
    for i,ps in enumerate(zip(*lists)):
        g = torch.randn_like(ps[0])
        for p in ps: p.grad = None if i in skip else g.clone()

options = st.tuples(st.sampled_from([0,0.5,0.9]), st.sampled_from([0,0.01]), st.booleans()).map(
    lambda o: dict(momentum=o[0], weight_decay=o[1], nesterov=o[2] and o[0]>0))

@settings(deadline=None, max_examples=60)
@given(options, options, st.lists(st.sets(st.integers(0,4)), min_size=1, max_size=8), st.sampled_from([torch.float32,torch.float64]))
def test_equals_torch_with_groups_and_missing_gradients(kw, own, skips, dtype):
    ps,qs = twins(5, dtype)
    a,b = (O([dict(params=iter(l[:2]), lr=0.3, **own), dict(params=l[2:])], lr=0.1, **kw) for O,l in ((SGD,ps),(T,qs)))
    for skip in skips:
        grads(ps, qs, skip=skip)
        before = [None if p.grad is None else p.grad.clone() for p in ps]
        a.step(); b.step()
        for p,g in zip(ps,before): assert p.grad is None if g is None else torch.equal(p.grad, g)   # not written to
        a.zero_grad(); b.zero_grad()
        assert all(p.grad is None for p in ps)
        same(ps, qs)
    for p,q in zip(ps,qs):
        assert set(a.state.get(p,{})) == set(b.state.get(q,{}))
        if b.state.get(q): same([a.state[p]['momentum_buffer']], [b.state[q]['momentum_buffer']])

@pytest.mark.parametrize('nesterov', [False,True])
def test_formula(nesterov): # by hand, with Python floats
    w,b,lr,mom,wd = 2.,0.,0.1,0.8,0.05
    p = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    opt = SGD([p], lr, momentum=mom, weight_decay=wd, nesterov=nesterov)
    for t in range(10):
        g = math.sin(t)+w
        p.grad = torch.tensor(g, dtype=torch.float64); opt.step()
        g += wd*w; b = mom*b+g; w -= lr*(g+mom*b if nesterov else b)
        assert abs(p.item()-w) < 1e-12

def test_plain_optimizer_moves_in_place_and_mixed_dtypes_work():
    ps = [leaf(3, dtype=d) for d in (torch.float32,torch.float64,torch.bfloat16)]
    old,ids = [p.detach().clone() for p in ps],[p.data_ptr() for p in ps]
    opt = Optimizer(ps, lr=0.5)
    grads(ps); opt.step()
    for p,o,i in zip(ps,old,ids): assert p.data_ptr()==i and p.requires_grad; same([p.detach()], [o-0.5*p.grad], tol=1e-2 if p.dtype==torch.bfloat16 else 1e-6)

def net(): torch.manual_seed(0); return nn.Sequential(nn.Linear(6,5), nn.Tanh(), nn.Linear(5,3)).double()
xs,ys = torch.randn(20,8,6,dtype=torch.float64),torch.randint(0,3,(20,8))
def run(m, opt, r=range(20), sched=None):
    for i in r:
        nn.functional.cross_entropy(m(xs[i]), ys[i]).backward()
        opt.step(); opt.zero_grad()
        if sched: sched.step()
    return list(m.parameters())

schedules = dict(step=lambda o: ls.StepLR(o,5,0.3), lam=lambda o: ls.LambdaLR(o,lambda i:1/(i+1)), one=lambda o: ls.OneCycleLR(o,max_lr=1.,total_steps=21),
    exp=lambda o: ls.ExponentialLR(o,0.9), cos=lambda o: ls.CosineAnnealingWarmRestarts(o,6), cyc=lambda o: ls.CyclicLR(o,0.01,0.5,step_size_up=4),
    seq=lambda o: ls.SequentialLR(o,[ls.LinearLR(o,0.1,total_iters=4),ls.PolynomialLR(o,15)],[5]))

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', schedules)
def test_schedules(name):
    ms,opts,seen = (net(),net()),[],([],[])
    for m,O in zip(ms,(SGD,T)): opts.append(O([dict(params=m[0].parameters(),lr=0.2), dict(params=m[2].parameters())], lr=0.1, momentum=0.8))
    scheds = [schedules[name](o) for o in opts]
    for i in range(20):
        for m,o,s,log in zip(ms,opts,scheds,seen): run(m,o,[i],s); log.append([(g['lr'],g['momentum']) for g in o.param_groups])
    assert seen[0]==seen[1] and len(set(map(str,seen[0])))>1
    if name in ('one','cyc'): assert len({m for r in seen[0] for _,m in r})>1     # the momentum is cycled too
    same(ms[0].parameters(), ms[1].parameters())

def test_plateau():
    opt = SGD([leaf(2)], 1.); s = ls.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    for _ in range(3): s.step(1.)
    assert opt.param_groups[0]['lr']==0.25

@pytest.mark.parametrize('First,Second', [(SGD,SGD),(SGD,T),(T,SGD)])
@pytest.mark.parametrize('name', [None,'one','step'])
def test_resume(First, Second, name):
    def make(O, lr): m = net(); o = O(m.parameters(), lr=lr, momentum=0.9, weight_decay=0.01, nesterov=True); return m,o,name and schedules[name](o)
    whole = run(*(r := make(SGD,0.1))[:2], sched=r[2])
    m,o,s = make(First, 0.1); run(m,o,range(9),s)
    f = io.BytesIO(); torch.save([m.state_dict(), o.state_dict(), s and s.state_dict()], f); f.seek(0)
    sd = torch.load(f, weights_only=True)
    m,o,s = make(Second, 0.7)
    for a,d in zip((m,o,s),sd): a and a.load_state_dict(d)
    same(run(m,o,range(9,20),s), whole)

def test_loaded_state_is_a_copy_of_the_parameters_dtype():
    m,m32 = net(),net().float(); o,o32 = (SGD(x.parameters(), 0.1, momentum=0.9) for x in (m,m32))
    run(m,o,range(2)); sd = o.state_dict(); o32.load_state_dict(sd)
    o2 = SGD(net().parameters(), 0.1, momentum=0.9); o2.load_state_dict(sd)
    assert all(s['momentum_buffer'].dtype==torch.float32 for s in o32.state.values())
    for s,q in zip(o.state.values(), o2.state.values()): assert s['momentum_buffer'].data_ptr()!=q['momentum_buffer'].data_ptr(); same(s.values(), q.values())
    o2.param_groups[0]['lr'] = 5; assert sd['param_groups'][0]['lr']==0.1==o.param_groups[0]['lr']
    sd['state'][0].clear(); sd['param_groups'][0].clear(); assert o.state_dict()['state'][0] and o.param_groups[0]['lr']==0.1

class Counts(SGD):
    "Keeps a count of its steps as PyTorch's Adam does, in a tensor of shape ()"
    def direction(self, ps, gs, group):
        for p in ps: self.state[p]['step'] = self.state[p].get('step', torch.tensor(0.))+1
        return [d/self.state[p]['step'] for p,d in zip(ps, super().direction(ps, gs, group))]

def test_state_with_a_number_as_a_tensor():
    m,m2,m3 = net(),net(),net().bfloat16(); o,o2,o3 = (Counts(x.parameters(), 0.1, momentum=0.9) for x in (m,m2,m3))
    run(m,o,range(3)); o2.load_state_dict(o.state_dict()); o3.load_state_dict(o.state_dict())
    assert all(s['step']==3 for s in o2.state.values()) and all(s['step'].dtype==torch.float32 for s in o3.state.values())
    m2.load_state_dict(m.state_dict()); run(m,o,range(3,6)); run(m2,o2,range(3,6)); same(m.parameters(), m2.parameters())
    assert o.state_dict()['state'][0]['step']==6 and not any(s['step'] is t['step'] for s,t in zip(o.state.values(), o2.state.values()))

@pytest.mark.parametrize('clone', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_independent_and_equal(clone):
    m = net(); o = SGD(m.parameters(), 0.1, momentum=0.9); s = ls.StepLR(o, 3); run(m,o,range(5),s)
    m2,o2 = clone((m,o)); old = [p.detach().clone() for p in m.parameters()]
    run(m2,o2,range(5,9)); same(m.parameters(), old)                # training the copy leaves the original alone
    same(run(m,o,range(5,9)), m2.parameters())
    assert not hasattr(type(o2).step, 'hooked') and 'momentum: 0.9' in repr(o2)

def test_compiled_step():
    def go(compiled):
        torch._dynamo.reset(); m = net(); o = SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01, nesterov=True); s = ls.StepLR(o,7)
        f = torch.compile(lambda i: run(m,o,[i]), backend='eager') if compiled else lambda i: run(m,o,[i])
        for i in range(20): f(i); s.step()
        return m.parameters()
    same(go(True), go(False), 1e-12)

def test_grad_scaler():
    ps,qs = twins(2)
    for l,O in (ps,SGD),(qs,T):
        o,sc = O(l, lr=0.1, momentum=0.9),torch.amp.GradScaler('cpu', init_scale=8.)
        for bad in (False,True,False):
            sc.scale(sum((p*(math.inf if bad else 1)).sum() for p in l)).backward(); sc.step(o); sc.update(); o.zero_grad()
    same(ps, qs)

@pytest.mark.parametrize('dtype', [torch.complex64, torch.float32])
def test_complex_and_one_tensor_alone(dtype):
    ps,qs = ([torch.ones(3, dtype=dtype, requires_grad=True)] for _ in range(2))
    a,b = SGD(ps[0], 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),T(qs, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    for _ in range(5): grads(ps, qs); a.step(); b.step()
    same(ps, qs, 1e-6)

def test_sparse_gradients():
    "What PyTorch does, or an error; never something else"
    for kw in dict(), dict(momentum=0.9):
        es = [nn.Embedding(4, 2, sparse=True) for _ in range(2)]; es[1].load_state_dict(es[0].state_dict())
        a,b = (O(e.parameters(), 0.1, **kw) for O,e in zip((SGD,T),es))
        for i in [1,2],[2,2],[0,1]:
            for e,o in zip(es,(a,b)): e(torch.tensor(i)).pow(2).sum().backward(); o.step(); o.zero_grad()
        same([es[0].weight], [es[1].weight], 1e-6)
    with pytest.raises((RuntimeError,NotImplementedError)):
        o = SGD(es[0].parameters(), 0.1, weight_decay=0.1); es[0](torch.tensor([1])).sum().backward(); o.step()

def test_groups():
    p,q,r = leaf(2),leaf(3),leaf(4).detach()
    opt = SGD([dict(params=p, lr=0.5), dict(params=[])], lr=0.1)      # one tensor alone; an empty group beside a full one
    opt.add_param_group(dict(params=(x for x in [q,r]), momentum=0.9))
    assert [(len(g['params']),g['lr'],g['momentum']) for g in opt.param_groups]==[(1,0.5,0),(0,0.1,0),(2,0.1,0.9)]
    grads([p,q]); old = r.clone(); opt.step(); same([r],[old])      # a frozen tensor stays
    group = dict(params=[leaf(1)]); opt.add_param_group(group); assert list(group)==['params']          # the caller's dict is not written to

w = leaf(3,2)
@pytest.mark.parametrize('params,kw,msg', [
    ([],{},'plain Python list'), (iter([]),{},'No parameters'), ([dict(params=[])],{},'No parameters'),
    ({w},{},'set'), (dict(params=[w]),{},'Parameter 0 is a str'), (nn.Linear(2,1),{},'Linear'), ([nn.Linear(2,1)],{},'Parameter 0 is a Linear'),
    (nn.Linear(2,1).named_parameters(),{},'tuple'), ([w,w*2],{},r'Parameter 1, shape \(3, 2\), was computed'), ([w,w],{},'Parameter 1.*twice'),
    ([dict(params=[w]),dict(params=[w])],{},'twice'),
    ([w],dict(lr=-0.1),'lr=-0.1'), ([w],dict(lr=math.nan),'lr=nan'), ([w],dict(lr=math.inf),'lr=inf'), ([dict(params=[w],lr=-2)],{},'lr=-2'),
    ([w],dict(momentum=1),'momentum=1: .*below 1'), ([w],dict(momentum=-0.1),'momentum=-0.1'), ([w],dict(momentum=math.nan),'momentum=nan'),
    ([dict(params=[w],momentum=2)],{},'momentum=2'), ([w],dict(weight_decay=-1),'weight_decay=-1'), ([w],dict(weight_decay=math.inf),'weight_decay=inf'),
    ([w],dict(nesterov=True),'momentum')])
def test_bad_arguments(params, kw, msg):
    with pytest.raises((ValueError,TypeError), match=msg): SGD(params, **{'lr':0.1, **kw})

@pytest.mark.parametrize('params', [{leaf(2)}, nn.Linear(2,1), {'a': leaf(2)}])
def test_a_group_needs_an_order(params):
    "A set changes its order from run to run, so that a loaded state would go to the wrong tensors"
    with pytest.raises(TypeError, match='model.parameters'): SGD([dict(params=params)], 0.1)
    with pytest.raises(TypeError, match='model.parameters'): SGD([w], 0.1).add_param_group(dict(params=params))

def test_refused_group_changes_nothing():
    opt = SGD([w], 0.1)
    with pytest.raises(ValueError): opt.add_param_group(dict(params=[leaf(2),w]))
    assert len(opt.param_groups)==1

def bad_states():
    m = net(); good = SGD(m.parameters(), 0.1, momentum=0.9); run(m,good,range(2)); sd = good.state_dict()
    def but(**kw): d = copy.deepcopy(sd); d['param_groups'][0].update(kw); return d
    return dict(model=(m.state_dict(),r'Groups of \[\] parameters, expected \[4\]'), fewer=(SGD([leaf(2)],0.1).state_dict(),r'\[1\].*\[4\]'), adam=(torch.optim.Adam(net().parameters()).state_dict(),'momentum=None'),
        groups=(SGD([dict(params=[leaf(2)]) for _ in range(4)],0.1).state_dict(),'this model'), lr=(but(lr=math.nan),'lr=nan'), momentum=(but(momentum=1.5),'momentum=1.5'),
        dampening=(T(net().parameters(),0.1,momentum=0.9,dampening=0.5).state_dict(),'dampening'), maximize=(T(net().parameters(),0.1,maximize=True).state_dict(),'maximize'))

@pytest.mark.parametrize('name', bad_states())
def test_state_that_does_not_fit(name):
    sd,msg = bad_states()[name]
    m = net(); opt = SGD(m.parameters(), 0.2, momentum=0.5); run(m,opt,range(3)); before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=msg): opt.load_state_dict(sd)
    after = opt.state_dict()                                          # a refused state changes nothing
    assert after['param_groups']==before['param_groups']
    for i,s in before['state'].items(): same(s.values(), after['state'][i].values())
