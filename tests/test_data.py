"The data lesson's module: PyTorch's behaviour, states, and everything that can go wrong with workers"
import collections, gc, itertools, json, multiprocessing, os, random, signal, sys, time, typing
import numpy as np, pytest, torch, torch.utils.data as tud
from hypothesis import given, settings, strategies as st
from minibatch.data import *

linux = pytest.mark.skipif(sys.platform!='linux', reason='fork')
quick = settings(deadline=None, max_examples=60)
Point = collections.namedtuple('Point', 'x y')

class Items:
    "A dataset that answers with `f(i)`"
    def __init__(self, n, f): self.n,self.f = n,f
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not -self.n<=i<self.n: raise IndexError('too far')
        return self.f(i)

class Many(Items):
    def __getitems__(self, idxs): return [self.f(i)*10 for i in idxs]

class Stream(tud.IterableDataset):
    "0 to n-1, shared out over the workers, unevenly"
    def __init__(self, n, noise=False): self.n,self.noise = n,noise
    def __iter__(self):
        w = tud.get_worker_info()
        for i in range(self.n) if w is None else range(w.id*3, self.n, w.num_workers+w.id): yield i + (torch.rand(()) if self.noise else 0)
    def __len__(self): return self.n

class Twice(tud.TensorDataset):
    def __getitem__(self, i): return [2*t for t in super().__getitem__(i)]

def same(a, b):
    "Equal values in equal types, all the way down"
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(a, torch.Tensor): assert a.dtype==b.dtype and a.shape==b.shape and torch.equal(a,b)
    elif isinstance(a, np.ndarray): assert a.dtype==b.dtype and np.array_equal(a,b)
    elif isinstance(a, dict): assert list(a)==list(b); [same(a[k],b[k]) for k in a]
    elif isinstance(a, (list,tuple)): assert len(a)==len(b); [same(*p) for p in zip(a,b)]
    else: assert a==b

def gen(s=0): return torch.Generator().manual_seed(s)
def t(*shape): return torch.rand(*shape, generator=gen(1))
def numbers(dl): return [torch.as_tensor(b[1] if isinstance(b,list) else b).tolist() for b in dl]
def ds(n): return Dataset(torch.arange(n)*1., torch.arange(n))

datasets = dict(
    tensors=lambda: tud.TensorDataset(t(23,3), torch.arange(23)), one=lambda: tud.TensorDataset(t(23,2)), twice=lambda: Twice(t(23,3)),
    subset=lambda: tud.Subset(tud.TensorDataset(t(23,3), torch.arange(23)), [5,3,-1,7,22,0,1]),
    subsub=lambda: tud.Subset(tud.Subset(Dataset(t(23,3), torch.arange(23)), range(20)), torch.arange(19,4,-1)),
    ours=lambda: Dataset(t(23,3), torch.arange(23)), ours_numpy=lambda: Dataset(t(23,3).numpy(), np.arange(23)), empty_rows=lambda: Dataset(t(23,0), t(23)),
    bare=lambda: t(23,2), array=lambda: np.arange(46).reshape(23,2), scalars=lambda: np.arange(23, dtype='f4'), strings=lambda: list('abcdefghijk'),
    array_of_strings=lambda: np.array(['a','bc','def']), numbers=lambda: list(range(11)), floats=lambda: [.5]*7, many=lambda: Many(9, lambda i: i),
    dicts=lambda: Items(9, lambda i: {'a':i, 'b':torch.full((2,),i), 'c':str(i), 'd':(i,[i*.5, b'x'])}), named=lambda: Items(9, lambda i: Point(i, t(2)*i)),
    npitems=lambda: Items(9, lambda i: (np.full((2,2),i,'f4'), np.int16(i))), chars=lambda: Items(7, lambda i: t(3)[:,None].T.bfloat16()),
    backwards=lambda: np.arange(10.)[::-1], byteorder=lambda: np.arange(10, dtype='>i2').reshape(5,2)[:,0].astype('>f4'), masked=lambda: np.ma.masked_array(np.arange(4.)),
    int16=lambda: tud.Subset(tud.TensorDataset(t(23,3)), np.array([5,-1,22], 'i2')), uint64=lambda: tud.Subset(ds(23), np.array([5,22], 'u8')),
    concat=lambda: tud.ConcatDataset([ds(5),ds(4)]), stack=lambda: tud.StackDataset(a=ds(9), b=list(range(9))), stream=lambda: Stream(23))

@pytest.mark.parametrize('name', datasets)
def test_same_batches_as_pytorch(name):
    for kw in (dict(batch_size=4), dict(batch_size=4, drop_last=True), dict(), dict(batch_size=None), dict(batch_size=100), dict(batch_size=5, collate_fn=list)):
        a,b = DataLoader(datasets[name](), **kw),tud.DataLoader(datasets[name](), **kw)
        assert len(a)==len(b)
        same(list(a), list(b))

@linux
@pytest.mark.parametrize('name', ['tensors','subset','ours_numpy','empty_rows','strings','many','dicts','named','npitems','chars','stream'])
def test_same_batches_as_pytorch_with_workers(name):
    for kw in (dict(batch_size=4), dict(batch_size=3, drop_last=True, prefetch_factor=1), dict(batch_size=None)):
        same(list(DataLoader(datasets[name](), num_workers=2, **kw)), list(tud.DataLoader(datasets[name](), num_workers=2, **kw)))

def samplers(d):
    yield dict(sampler=tud.RandomSampler(d, generator=gen(3)), batch_size=4)
    yield dict(sampler=tud.RandomSampler(d), batch_size=4)
    yield dict(sampler=tud.RandomSampler(d, replacement=True, num_samples=30, generator=gen()), batch_size=4, drop_last=True)
    yield dict(sampler=tud.SequentialSampler(d))
    yield dict(sampler=tud.SubsetRandomSampler([1,5,2,-3]), batch_size=3)
    yield dict(sampler=tud.WeightedRandomSampler([.1*i for i in range(len(d))], 40, generator=gen(2)), batch_size=7)
    yield dict(batch_sampler=tud.BatchSampler(tud.RandomSampler(d), 4, False))
    yield dict(batch_sampler=[[1,2],[3],[0,4,5]])
    yield dict(sampler=[3,1,2], batch_size=2)
    yield dict(sampler=tud.BatchSampler(tud.RandomSampler(d), 4, False), batch_size=None)
    yield dict(sampler=torch.utils.data.distributed.DistributedSampler(d, 3, 1, seed=4), batch_size=3)

@pytest.mark.parametrize('k', range(11))
def test_same_batches_with_pytorchs_samplers(k):
    for d in (ds(17), np.arange(17) if k==9 else list(range(17))):
        (a,ka),(b,kb) = ((c, list(samplers(d))[k]) for c in (DataLoader,tud.DataLoader))
        a,b = a(d,**ka),b(d,**kb)
        assert len(a)==len(b)
        for _ in range(2):
            torch.manual_seed(5); x = list(a)
            torch.manual_seed(5); same(x, list(b))

@quick
@given(st.integers(1,70), st.integers(1,80), st.booleans(), st.booleans(), st.sampled_from(['f4','f8','i8','u1','?','f2','c8']), st.lists(st.integers(0,3), max_size=2))
def test_any_array(n, bs, drop, subset, dtype, shape):
    x = np.asarray(np.random.default_rng(n).integers(0,9,(n,*shape)), dtype)
    d = Dataset(x, torch.arange(n)) if not subset else tud.Subset(tud.TensorDataset(torch.from_numpy(x), torch.arange(n)), list(range(n-1,-1,-2)))
    a,b = (c(d, bs, drop_last=drop) for c in (DataLoader,tud.DataLoader))
    assert len(a)==len(b)
    same(list(a), list(b))
    order = random.Random(n).sample(range(len(d)), len(d))
    same(list(DataLoader(d, bs, sampler=order)), list(tud.DataLoader(d, bs, sampler=order)))

@pytest.mark.parametrize('kw', [dict(num_workers=-1), dict(timeout=-1), dict(persistent_workers=True), dict(sampler=[0], shuffle=True), dict(batch_size=0),
    dict(batch_size=2.5), dict(batch_size=True), dict(batch_size=-3), dict(batch_size='8'), dict(batch_sampler=[[0]], batch_size=2), dict(batch_sampler=[[0]], shuffle=True),
    dict(batch_sampler=[[0]], drop_last=True), dict(batch_sampler=[[0]], sampler=[0]), dict(batch_size=None, drop_last=True), dict(timeout=3), dict(prefetch_factor=4)])
def test_contradictory_arguments(kw):
    for d in (ds(5), Stream(5)):
        errs = []
        for c in (DataLoader, tud.DataLoader):
            with pytest.raises(Exception) as e: list(c(d, **kw))
            errs.append(type(e.value))
        assert errs[0] is errs[1]
    for kw in (dict(shuffle=True), dict(sampler=[0]), dict(batch_sampler=[[0]])):
        with pytest.raises(ValueError, match='IterableDataset'): DataLoader(Stream(5), **kw)

def test_bad_data():
    with pytest.raises(ValueError, match='x has 3 rows and y has 2'): Dataset(torch.zeros(3), torch.zeros(2))
    for empty in ([], ds(0), tud.Subset(ds(3), [])):
        with pytest.raises(ValueError, match='empty'): DataLoader(empty)
    for bs in (0, -1, 2.5, '8', True, None):
        with pytest.raises(ValueError, match='positive integer'): Sampler(ds(4), bs)
    for d in (ds(5), list(range(5)), tud.Subset(ds(9), range(5)), Items(5, float)):
        for bad in (5, -6):
            with pytest.raises(IndexError, match=rf'index {bad} of 5 samples \(0..4\)'): list(DataLoader(d, 2, sampler=[0,bad]))
            with pytest.raises(IndexError, match=rf'index {bad} of 5'): list(DataLoader(d, batch_sampler=[torch.tensor([0,bad])]))
    with pytest.raises(IndexError, match='integers'): list(DataLoader(ds(5), 2, sampler=[0.,1.]))
    with pytest.raises(IndexError, match='at least one'): list(DataLoader(ds(5), batch_sampler=[[0],[]]))
    with pytest.raises(ValueError, match='`batch_sampler`'): DataLoader(ds(5), 2, sampler=Sampler(ds(5), 2))
    ragged = Items(9, lambda i: {'a':torch.zeros(3+(i==6), 2), 'b':i})
    for nw in (0,1):
        with pytest.raises(RuntimeError, match=r"samples 4 and 6 .*'a': \(3, 2\).*'a': \(4, 2\).*collate_fn"): list(DataLoader(ragged, 4, num_workers=nw))
    with pytest.raises(RuntimeError, match=r'samples 0 and 1 .*\(2,\).*\(3,\)'): collate([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(TypeError, match='default_collate'): list(DataLoader([object()]))

# ---- states

def cut(make, k, epochs=3):
    """All batches in one go, and those after a stop at batch `k` in a fresh loader, when torch's generator is somewhere else;
    the loop's body draws random numbers too, as dropout would"""
    torch.manual_seed(1)
    dl,seen = make(),[]
    for e in range(epochs):
        for b in dl:
            seen.append((e,b)); torch.rand(1)
            if len(seen)==k: state,at = json.loads(json.dumps(dl.state_dict())),e
    torch.manual_seed(99); torch.rand(7)
    dl = make(); dl.load_state_dict(state)
    same([(e,b,torch.rand(1))[:2] for e in range(at, epochs) for b in dl], seen[k:])

@quick
@given(st.data(), st.integers(1,40), st.integers(1,12), st.booleans(), st.booleans(), st.sampled_from(['torch','own','sampler']))
def test_resume_anywhere(data, n, bs, shuffle, drop, rule):
    def make():
        if rule=='sampler': return DataLoader(ds(n), batch_sampler=Sampler(ds(n), bs, shuffle, drop, seed=4))
        return DataLoader(ds(n), bs, shuffle, drop_last=drop, generator=gen(8) if rule=='own' else None)
    if len(make()): cut(make, data.draw(st.integers(1, 3*len(make()))))
    else: assert list(make())==[]
    s = Sampler(ds(n), bs, shuffle, drop, seed=4)
    rest = [[i.tolist() for i in map(torch.as_tensor, s.epoch(5, k))] for k in range(len(s)+2)]
    assert all(r==rest[0][k:] for k,r in enumerate(rest)) and [] not in rest[0]

@pytest.mark.parametrize('nw', [0, pytest.param(2, marks=linux)])
def test_resume_with_pytorchs_samplers_and_streams(nw):
    d = np.arange(17)
    for k in (0,2,5,8) if nw else range(11):
        for at in (1,2,5): cut(lambda: DataLoader(d, num_workers=nw, **list(samplers(d))[k]), min(at, 3*len(DataLoader(d, **list(samplers(d))[k]))))
    for at in (1,3,4,7): cut(lambda: DataLoader(Stream(17, noise=True), 5, num_workers=nw), at)
    for at in (1,17,18): cut(lambda: DataLoader(ds(17), None, True, num_workers=nw), at)

@linux
@settings(deadline=None, max_examples=8)
@given(st.data(), st.integers(1,2), st.integers(1,4), st.booleans())
def test_resume_with_workers(data, nw, prefetch, noise):
    d = Items(31, lambda i: (i, torch.rand(2)*noise, random.random()*noise, np.random.rand()*noise))
    cut(lambda: DataLoader(d, 4, True, num_workers=nw, prefetch_factor=prefetch), data.draw(st.integers(1,24)))

class Lazy:
    "Draws one index after the other from torch's generator"
    def __iter__(self): return (int(torch.randint(31, ())) for _ in range(31))
    def __len__(self): return 31

@pytest.mark.parametrize('nw', [0, pytest.param(2, marks=linux)])
def test_resume_with_random_items_and_lazy_samplers(nw):
    d = Items(31, lambda i: (i, torch.rand(2)))
    noisy = lambda b: [b[0], b[1]+torch.rand(len(b[1]))]
    for at in (1,5,8,11):
        cut(lambda: DataLoader(d, 4, sampler=tud.RandomSampler(d), num_workers=nw), at)
        cut(lambda: DataLoader(d, 4, True, num_workers=nw, generator=gen(3)), at)
        cut(lambda: DataLoader(ds(31), 4, True, num_workers=nw, generator=gen(3), transform=noisy), at)
        if not nw: cut(lambda: DataLoader(ds(31), 4, sampler=Lazy()), at)

class Drawn:
    "An order that `draw` draws when the epoch begins"
    def __init__(self, draw): self.draw = draw
    def __iter__(self): return iter(self.draw())
    def __len__(self): return 12

@pytest.mark.parametrize('draw', [lambda: np.random.permutation(12).tolist(), lambda: random.sample(range(12), 12),
                                  lambda: torch.randperm(12).tolist()], ids=['numpy','python','torch'])
def test_resume_with_samplers_that_draw_from_any_generator(draw):
    np.random.seed(0); random.seed(0)
    def loop(dl):
        for b in dl: yield b.tolist(), np.random.rand(), random.random()        # the loop draws, too
    for at in (1,3,4,6):
        dl = DataLoader(range(12), 3, sampler=Drawn(draw)); it = itertools.chain(loop(dl), loop(dl))
        for _ in range(at): next(it)
        state = json.loads(json.dumps(dl.state_dict())); rest = list(it)
        new = DataLoader(range(12), 3, sampler=Drawn(draw)); new.load_state_dict(state)
        assert list(itertools.chain(*(loop(new) for _ in range(1+(at<=4)))))==rest

class Shuffled(tud.IterableDataset):
    "Shuffles when an epoch begins, in the three ways there are"
    def __iter__(self): return iter([np.random.permutation(99).tolist(), torch.randperm(99).tolist(), random.sample(range(99), 99)])

@linux
def test_streams_that_shuffle_when_they_begin():
    def epochs(k=2):
        torch.manual_seed(5)
        dl = DataLoader(Shuffled(), None, num_workers=2)
        return [list(dl) for _ in range(k)]
    a = epochs(); random.seed(7); np.random.seed(7)
    assert a==epochs()                                                    # `torch.manual_seed` rules
    assert len({tuple(o) for e in a for o in e})==12                      # another order in each worker and each epoch
    for at in (1,4,6,7): cut(lambda: DataLoader(Shuffled(), None, num_workers=2), at, epochs=2)

def test_resume_at_once_twice_and_between_epochs():
    torch.manual_seed(0)
    dl = DataLoader(ds(10), 3, True); new = lambda s: (d := DataLoader(ds(10), 3, True), d.load_state_dict(s))[0]
    s = dl.state_dict(); a = [numbers(dl) for _ in range(3)]
    assert a[0]!=a[1]!=a[2]
    d2 = new(s); assert [numbers(d2) for _ in range(3)]==a                             # before anything
    torch.manual_seed(0); d2 = DataLoader(ds(10), 3, True); numbers(d2); s = d2.state_dict()
    d3 = new(s); assert d3.state_dict()==s and [numbers(d3) for _ in range(2)]==a[1:]  # after an epoch: the next, whole
    torch.manual_seed(0); d2 = DataLoader(ds(10), 3, True)
    for b in d2: s = d2.state_dict()
    d3 = new(s); assert numbers(d3)==[] and numbers(d3)==a[1]                          # after the last batch: nothing is left of the epoch
    torch.manual_seed(0); it = iter(d2); next(it); s = d2.state_dict()
    d3 = new(s); it3 = iter(d3); next(it3); s2 = d3.state_dict(); assert s2['batch']==2
    d4 = new(s2); assert numbers(d4)==a[0][2:]                                         # a resumed one, stopped again
    assert numbers(it)==a[0][1:]                                                       # and the first never noticed

def test_resume_after_an_error():
    bad = {7}
    def f(i):
        if i in bad: raise OSError('the disk is away')
        return i
    torch.manual_seed(0); d = Items(12, f); dl,seen = DataLoader(d, 3, True),[]
    with pytest.raises(OSError):
        for b in dl: seen += b.tolist()
    s = dl.state_dict(); bad.clear()
    d2 = DataLoader(d, 3, True); d2.load_state_dict(s)
    assert sorted(seen+sum(numbers(d2),[]))==list(range(12))

def test_state_is_small_and_plain():
    sizes = []
    for n in (10, 100_000):
        dl = DataLoader(range(n), 5, True); next(iter(dl)); s = dl.state_dict()
        assert json.loads(json.dumps(s))==s
        sizes.append(len(json.dumps(s)))
    assert max(sizes)<30_000 and abs(sizes[0]-sizes[1])<30

def test_state_of_another_loader():
    dl = DataLoader(ds(10), 3, True); next(iter(dl)); s = dl.state_dict()
    for other,what in ((DataLoader(ds(11),3,True), 'samples = 10, here it is 11'), (DataLoader(ds(10),4,True), 'bs = 3, here it is 4'),
                       (DataLoader(ds(10),3), 'shuffle = True, here it is False'), (DataLoader(ds(10),3,True,drop_last=True), 'drop_last'),
                       (DataLoader(ds(10),3,True,generator=gen()), 'generators'), (DataLoader(Stream(10),3), 'workers'),
                       (DataLoader(ds(10),3,sampler=tud.RandomSampler(ds(10))), 'BatchSampler')):
        with pytest.raises(ValueError, match=what): other.load_state_dict(s)
    for bad in ({}, None, s | dict(samples=None), {k:v for k,v in s.items() if k!='rng'}):
        with pytest.raises(ValueError, match='not the state|samples = None'): dl.load_state_dict(bad)
    d = ds(12); samplers = [tud.RandomSampler(d), tud.RandomSampler(d, replacement=True), tud.RandomSampler(d, num_samples=5),
                            *(tud.DistributedSampler(d, 2, r, seed=s) for r in (0,1) for s in (1,2))]
    for a,b in itertools.permutations(samplers, 2):
        with pytest.raises(ValueError, match='Sampler'): DataLoader(d, 3, sampler=b).load_state_dict(DataLoader(d, 3, sampler=a).state_dict())

# ---- order and seeds

def test_obeys_seeds():
    dl = DataLoader(ds(50), 8, True)
    torch.manual_seed(3); a,b = numbers(dl),numbers(dl)
    assert a!=b and sorted(sum(a,[]))==sorted(sum(b,[]))==list(range(50))
    torch.manual_seed(3); assert [numbers(dl),numbers(dl)]==[a,b]
    own = [numbers(DataLoader(ds(50), 8, True, generator=gen(7))) for _ in range(2)]
    assert own[0]==own[1]!=a
    before = torch.get_rng_state(); numbers(DataLoader(ds(50), 8, True, generator=gen(7))); assert torch.equal(before, torch.get_rng_state())
    s = Sampler(ds(50), 8, True); torch.manual_seed(3); assert [i.tolist() for i in s]==a
    s = Sampler(ds(50), 8, True, seed=5); x,y = list(map(torch.Tensor.tolist,s)),list(map(torch.Tensor.tolist,s)); assert x!=y
    assert x==list(map(torch.Tensor.tolist, Sampler(ds(50), 8, True, seed=5)))

@linux
def test_workers_draw_as_much_as_no_workers():
    ends = []
    for nw,sh in itertools.product((0,2),(False,True)):
        torch.manual_seed(0); numbers(DataLoader(ds(9), 2, sh, num_workers=nw)); ends.append(torch.rand(1).item())
    assert len(set(ends))==1

@linux
def test_random_items_do_not_depend_on_the_number_of_workers():
    got = []
    for nw in (1,2):
        torch.manual_seed(0); got.append(list(DataLoader(Items(20, lambda i: (torch.rand(3), random.random(), np.random.rand())), 3, num_workers=nw)))
    same(got[0], got[1])
    assert len({x for b in got[0] for x in b[1].tolist()})==20

@pytest.mark.parametrize('nw', [0, pytest.param(2, marks=linux)])
def test_two_iterators(nw):
    dl = DataLoader(ds(20), 3, True, num_workers=nw, persistent_workers=nw>0)
    torch.manual_seed(0); a,b = numbers(dl),numbers(dl)
    torch.manual_seed(0); x,y = zip(*zip(numbers(iter(dl)), numbers(iter(dl)))); assert [list(x),list(y)]==[a,b]
    torch.manual_seed(0)
    i,j = iter(dl),iter(dl); x,y = [],[]
    for _ in range(7): x += numbers([next(i)]); y += numbers([next(j)])
    assert [x,y]==[a,b]
    torch.manual_seed(0)
    for i,_ in enumerate(dl):
        if i==2: list(dl)                       # another epoch inside, after which the outer one goes on
        if i==4: s = dl.state_dict(); break
    d2 = DataLoader(ds(20), 3, True); d2.load_state_dict(s); assert numbers(d2)==a[5:]   # the one that moved last

@linux
def test_persistent_workers():
    dl = DataLoader(Items(12, lambda i: os.getpid()), 2, num_workers=2, persistent_workers=True)
    pids = [set(sum(numbers(dl),[])) for _ in range(3)]
    assert pids[0]==pids[1]==pids[2]
    for b in dl: break
    assert pids[0]==set(sum(numbers(dl),[]))               # also after an epoch that was left early
    now = pids[0]
    try: os.kill(min(now), signal.SIGKILL); list(dl)       # the error comes with the signal of the death
    except RuntimeError: pass
    for _ in range(2):
        try: now = set(sum(numbers(dl),[]))
        except RuntimeError: pass
    assert not pids[0]&now                                 # a pool that lost a worker is replaced
    del dl; gc.collect(); assert not multiprocessing.active_children()
    class Count(tud.IterableDataset):
        def __iter__(self): self.n = getattr(self,'n',0)+1; return iter([self.n]*3)
    dl = DataLoader(Count(), 2, num_workers=1, persistent_workers=True)
    got = []
    for _ in range(2): torch.manual_seed(0); got.append(numbers(dl))         # the same seed is a new epoch, too
    assert got==[[[1,1],[1]],[[2,2],[2]]]

def test_transform_views_and_pinning():
    x = torch.randint(0,256,(20,4),dtype=torch.uint8); d = Dataset(x, torch.arange(20))
    got = list(DataLoader(d, 8, transform=lambda b: [b[0].float()/255, b[1]]))
    same(torch.cat([b[0] for b in got]), x.float()/255)
    assert next(iter(DataLoader(d, 8)))[0].data_ptr()==x.data_ptr()
    a = np.arange(8.); a.flags.writeable = False
    b = next(iter(DataLoader(a, 4))); b += 1; assert a[0]==0
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match='GPU'): same(list(DataLoader(d, 8, pin_memory=True)), list(DataLoader(d, 8)))

def test_get_dls():
    tr,va = get_dls(ds(20), ds(9), 4, drop_last=True, num_workers=0)
    assert (tr.batch_size, va.batch_size, len(tr), len(va))==(4,8,5,2)
    assert numbers(va)==[list(range(8)),[8]] and sorted(sum(numbers(tr),[]))==list(range(20))!=sum(numbers(tr),[])
    tr,va = get_dls(ds(20), tud.Subset(ds(9), range(9)), 4, device='meta', transform=lambda b: [b[0]+1, b[1]])
    assert tr.dataset.x.device.type=='meta' and va.dataset.dataset.x.device.type=='cpu'       # moved whole; moved batch by batch
    assert {t.device.type for dl in (tr,va) for b in dl for t in b}=={'meta'}
    assert isinstance(tr, tud.DataLoader)
    tr,va = get_dls(ds(20), ds(9), 4, sampler=tud.SubsetRandomSampler([3,4]))
    assert sorted(sum(numbers(tr),[]))==[3,4] and sum(numbers(va),[])==list(range(9))
    on_meta = Dataset(*(torch.zeros(9, device='meta') for _ in 'xy'))
    with pytest.raises(NotImplementedError): get_dls(on_meta, ds(9), 4, device='cpu')         # tries to bring them here, from where nothing comes

def test_memory_map(tmp_path):
    rows = 2**20
    a = np.memmap(tmp_path/'a.bin', 'f4', 'w+', shape=(rows,256)); a[7] = 7; a.flush()           # 1 GB, nearly all of it a hole
    rss = lambda: int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20 if sys.platform=='linux' else 0
    d = Dataset(np.memmap(tmp_path/'a.bin', 'f4', 'r', shape=(rows,256)), np.arange(rows))
    for i,((xb,yb),before) in enumerate(zip(DataLoader(d, 64, True), itertools.repeat(rss()+16))):
        assert torch.equal(xb.sum(1)>0, yb==7)
        if i%20==0: assert rss()<before+200
        if i==500: break
    xb,_ = next(iter(DataLoader(d, 64))); xb[:] = 1; assert d.x[0,0]==0    # a copy: the map is read-only

# ---- workers

def test_all_keywords_of_pytorch():
    assert typing.get_args(DataLoader[int])==(int,)
    for kw in (dict(pin_memory_device=''), dict(in_order=True)):
        if hasattr(DataLoader(ds(4)), next(iter(kw))): assert len(DataLoader(ds(4), 2, **kw))==2
    with pytest.raises(TypeError): DataLoader(ds(4), no_such_argument=1)
    a = DataLoader(ds(4), 2, False, None, None, 1, None, False, True, 7, print, 'spawn', gen())         # by place
    b = tud.DataLoader(ds(4), 2, False, None, None, 1, None, False, True, 7, print, 'spawn', gen())
    for k in ('drop_last','timeout','worker_init_fn','multiprocessing_context'): assert getattr(a,k)==getattr(b,k)

@linux
def test_out_of_order():
    if not hasattr(DataLoader(ds(4)), 'in_order'): pytest.skip('from torch 2.6 on')
    go = multiprocessing.get_context('fork').Event()
    d = Items(40, lambda i: (go.wait(30) if i==0 else go.set() if i==39 else None, i)[1])     # 0 waits for 39
    dl = DataLoader(d, 2, num_workers=2, in_order=False)
    seen = sum(numbers(dl), [])
    assert seen[:2]!=[0,1] and sorted(seen)==list(range(40))
    assert sorted(torch.cat(list(DataLoader(Stream(30), 4, num_workers=2, in_order=False))).tolist())==sorted(
           torch.cat(list(tud.DataLoader(Stream(30), 4, num_workers=2))).tolist())
    next(iter(dl))
    with pytest.raises(ValueError, match='in_order'): dl.state_dict()

class Rewinds(tud.IterableDataset):
    "`__iter__` rewinds and returns the dataset itself"
    def __iter__(self): self.i = -1; return self
    def __next__(self):
        self.i += 1
        if self.i==6: raise StopIteration
        return self.i

class OnlyNext:
    i = -1
    __next__ = Rewinds.__next__

class Bare(tud.IterableDataset):
    def __iter__(self): return OnlyNext()

@pytest.mark.parametrize('nw', [0, pytest.param(1, marks=linux)])
def test_streams_of_all_kinds(nw):
    for d in (Rewinds(), Bare()):
        for bs in (4,None): same(list(DataLoader(d, bs, num_workers=nw)), list(tud.DataLoader(d, bs)))

@linux
def test_copies_of_a_loader_with_live_workers():
    import copy
    dl = DataLoader(ds(12), 4, num_workers=1, persistent_workers=True); list(dl)
    assert numbers(copy.deepcopy(dl))==numbers(dl)==[[0,1,2,3],[4,5,6,7],[8,9,10,11]]

@linux
def test_worker_exception():
    class Odd(Exception):
        def __init__(self, a, b): super().__init__(a,b)
    def f(i, err):
        if i==5: raise err
        return i
    def fails(exc, match, d, bs=2, **kw):
        with pytest.raises(exc, match=match): list(DataLoader(d, bs, num_workers=1, **kw))
    for err,kind in ((ValueError('five is right out'),ValueError), (KeyError('five'),KeyError), (Odd(1,2),RuntimeError)):
        with pytest.raises(kind) as e: list(DataLoader(Items(9, lambda i: f(i,err)), 2, num_workers=2))
        for word in ('worker process 0, batch 2, index 5', 'in f', type(err).__name__): assert word in str(e.value), str(e.value)
    fails(Exception, 'pickle', Items(9, lambda i: lambda: i), collate_fn=list)      # PyTorch would wait for ever
    fails(ValueError, r'index \[4, 5\]', Many(9, lambda i: f(i,ValueError())))
    fails(ZeroDivisionError, r'index \[2, 3\]', Items(9, int), collate_fn=lambda b: b[0]//(b[0]-2))
    def init(w): raise ValueError('no start')
    fails(ValueError, 'no start', ds(9), worker_init_fn=init)
    fails(IndexError, r'index 9 of 9', Items(9, int), sampler=[1,9])
    assert not multiprocessing.active_children()

@linux
def test_worker_init_and_info():
    d = Items(8, lambda i: (lambda w: (w.id, w.num_workers, int(os.environ['WHO']), w.dataset.mark))(tud.get_worker_info()))
    def init(w):
        os.environ['WHO'] = str(w)
        tud.get_worker_info().dataset.mark = 7+w      # the dataset itself, this worker's copy of it
    got = [[x.tolist() for x in b] for b in DataLoader(d, 2, num_workers=2, worker_init_fn=init)]
    assert got==[[[w]*2, [2]*2, [w]*2, [7+w]*2] for w in (0,1,0,1)]

@linux
def test_killed_workers():
    "At once, in the middle of a large batch, and while we wait for the other one"
    large = Items(400, lambda i: torch.full((3_000_000,),i))
    waits = Items(400, lambda i: i if i!=4 else signal.pause())
    for d in (ds(400), large, waits):
        for victim in (0,1):
            it = iter(DataLoader(d, 2, num_workers=2)); next(it)
            procs = sorted(multiprocessing.active_children(), key=lambda p: p.pid)
            start = time.monotonic()
            broken = (RuntimeError,OSError,EOFError)      # the last two if it died while it sent a tensor
            with pytest.raises(broken, match=rf'worker.*{procs[victim].pid}|[Cc]onnection|^$|roken|No such'):
                procs[victim].kill()
                for b in it: pass
            if d is not waits: assert time.monotonic()<start+5
            it.close()
            assert not any(p.is_alive() for p in procs)

@linux
def test_hanging_worker_is_a_timeout():
    hangs = Items(9, lambda i: i if i!=4 else signal.pause())
    with pytest.raises(RuntimeError, match='timed out after 0.5 s'): list(DataLoader(hangs, 2, num_workers=1, timeout=.5))
    assert not multiprocessing.active_children()

@linux
@pytest.mark.parametrize('how', ['break','raise','del','generator'])
def test_leaving_early_leaves_nothing(how):
    shm,fds = set(os.listdir('/dev/shm')),len(os.listdir('/proc/self/fd'))
    it = iter(DataLoader(Items(400, lambda i: torch.full((500_000,),i)), 4, num_workers=2)); next(it)
    try:
        if how=='generator': it.close()
        for b in it:
            if how=='raise': raise ZeroDivisionError
            break
    except ZeroDivisionError: pass
    it = b = None
    assert not multiprocessing.active_children()
    assert set(os.listdir('/dev/shm'))<=shm and len(os.listdir('/proc/self/fd'))<=fds+8

def test_spawn():
    d = Dataset(torch.arange(9.), np.arange(9))
    same(list(DataLoader(d, 2, num_workers=1, multiprocessing_context='spawn')), list(DataLoader(d, 2)))

# what has a state of its own

class Drawing(tud.Sampler):
    "An order drawn anew each epoch from a generator of its own"
    def __init__(self, g): self.g = g
    def __len__(self): return 12
    def __iter__(self):
        order = list(range(12))
        if isinstance(self.g, torch.Generator): return iter(torch.randperm(12, generator=self.g).tolist())
        self.g.shuffle(order)
        return iter(order)

class Counting(tud.Sampler):
    "An order that depends on how many epochs there were; a loaded state is the beginning of an epoch"
    def __init__(self, n=12): self.n,self.epochs = n,0
    def __len__(self): return self.n
    def order(self): return np.random.default_rng(self.epochs).permutation(self.n).tolist()
    def __iter__(self):
        self.epochs += 1
        return iter(self.order())
    def state_dict(self): return dict(epochs=self.epochs)
    def load_state_dict(self, s): self.epochs = s['epochs']

class Cursor(Counting):
    "The same, but a loaded state is a place from which `iter` goes on, as torchdata has it"
    at = 0
    def __iter__(self):
        start,order = self.at,self.order()
        for self.at in range(start+1, self.n+1): yield order[self.at-1]
        self.at,self.epochs = 0,self.epochs+1
    def state_dict(self): return dict(epochs=self.epochs, at=self.at)
    def load_state_dict(self, s): self.epochs,self.at = s['epochs'],s['at']

own_gens = dict(python=lambda: random.Random(1), numpy=lambda: np.random.default_rng(1), old_numpy=lambda: np.random.RandomState(1), torch=lambda: gen(1))
own_samplers = dict({k: (lambda g=g: dict(batch_size=3, sampler=Drawing(g()))) for k,g in own_gens.items()},
    counting=lambda: dict(batch_size=3, sampler=Counting()), cursor=lambda: dict(batch_size=3, sampler=Cursor()), singles=lambda: dict(batch_size=None, sampler=Cursor()),
    inside=lambda: dict(batch_sampler=tud.BatchSampler(Cursor(), 5, False)), batches=lambda: dict(batch_sampler=Batches()))

class Batches(Counting):
    def order(self): return [[i,i] for i in super().order()]

def as_lists(batches): return [b.tolist() if isinstance(b, torch.Tensor) else b for b in batches]

@pytest.mark.parametrize('nw', [0, pytest.param(2, marks=linux)])
@pytest.mark.parametrize('name', own_samplers)
@pytest.mark.parametrize('before,k', [(0,0), (0,2), (1,1), (2,3)])
def test_resume_with_samplers_that_have_a_state(name, nw, before, k):
    "In whichever epoch, and at any batch, the rest of it and the next one are those of a loader that never stopped"
    def new(): return DataLoader(list(range(12)), num_workers=nw, **own_samplers[name]())
    dl = new()
    for _ in range(before): list(dl)
    it = iter(dl)
    for _ in range(k): next(it)
    state = json.loads(json.dumps(dl.state_dict()))
    want = as_lists(it),as_lists(dl)
    other = new(); list(other)                     # has been used, too
    other.load_state_dict(state)
    got = as_lists(other),as_lists(other)
    assert got==want

class Wearing(Items):
    "A dataset whose items depend on how many were asked for"
    asked = 0
    def __getitem__(self, i): self.asked += 1; return 100*self.asked+i
    def state_dict(self): return dict(asked=self.asked)
    def load_state_dict(self, s): self.asked = s['asked']

class Placed(tud.IterableDataset):
    "A stream that knows its place"
    def __init__(self): self.at,self.epochs = 0,0
    def __iter__(self):
        for self.at in range(self.at+1, 12): yield 100*self.epochs+self.at
        self.at,self.epochs = 0,self.epochs+1
    def state_dict(self): return dict(at=self.at, epochs=self.epochs)
    def load_state_dict(self, s): self.at,self.epochs = s['at'],s['epochs']

@pytest.mark.parametrize('new', [lambda: DataLoader(Wearing(11, None), 3), lambda: DataLoader(Placed(), 3), lambda: DataLoader(Wearing(12, None), 3, sampler=Counting())])
@pytest.mark.parametrize('before,k', [(0,1), (1,2), (1,0)])
def test_resume_with_datasets_that_have_a_state(new, before, k):
    dl = new()
    for _ in range(before): list(dl)
    state = dl.state_dict()
    it = iter(dl)
    for _ in range(k): next(it); state = dl.state_dict()
    want = as_lists(it),as_lists(dl)
    other = new(); list(other)
    other.load_state_dict(state)
    assert (as_lists(other),as_lists(other))==want

@linux
def test_what_cannot_go_on_exactly_is_refused_when_the_state_is_taken():
    dl = DataLoader(Wearing(12, None), 3, num_workers=1)
    assert dl.state_dict()                        # between epochs: workers begin with what is here
    it = iter(dl); next(it)
    with pytest.raises(ValueError, match='num_workers=0'): dl.state_dict()
    dl = DataLoader(Items(12, None), 3, num_workers=1); dl.dataset.rng = np.random.default_rng()
    dl.dataset.f = lambda i: i
    it = iter(dl); next(it)
    with pytest.raises(ValueError, match='num_workers=0'): dl.state_dict()
    for once in ((i for i in range(12)), iter(range(12)), itertools.chain(range(12)), map(int, range(12))):
        dl = DataLoader(list(range(12)), 3, sampler=once)
        it = iter(dl); next(it)
        with pytest.raises(ValueError, match='only once'): dl.state_dict()

# whose generators there are

class Jitter:
    "Adds noise from a generator of its own"
    def __init__(self): self.g = np.random.default_rng(0)
    def __call__(self, b): return b+self.g.random()
    def list(self, samples): return torch.stack([torch.as_tensor(s+self.g.random()) for s in samples])

class Through(Items):
    "Items that pass through a transform, which is an attribute of an attribute"
    def __init__(self): super().__init__(12, None); self.parts = dict(steps=[Jitter()])
    def __getitem__(self, i): return self.parts['steps'][0](i)

class NoisyStream(Stream):
    def __init__(self): super().__init__(12); self.jitter = Jitter()
    def __iter__(self): return map(self.jitter, range(12))

def subset(): return tud.random_split(Through(), [8,4], gen(0))[0]
homes = dict(dataset=lambda **kw: DataLoader(Through(), 2, **kw), subset=lambda **kw: DataLoader(subset(), 2, **kw),
             concat=lambda **kw: DataLoader(tud.ConcatDataset([Through(),Through()]), 2, **kw), transform=lambda **kw: DataLoader(list(range(12)), 2, transform=Jitter(), **kw),
             method=lambda **kw: DataLoader(list(range(12)), 2, collate_fn=Jitter().list, **kw))
orders = dict(ours=lambda n: dict(shuffle=True), weighted=lambda n: dict(sampler=tud.WeightedRandomSampler(torch.ones(n), n)),
              own=lambda n: dict(sampler=tud.RandomSampler(range(n), replacement=True, num_samples=n, generator=gen(3))), numpy=lambda n: dict(sampler=Drawing(np.random.default_rng(2))))
streams = dict(stream=lambda: DataLoader(NoisyStream(), 2), around=lambda: DataLoader(Stream(12), 2, transform=Jitter()), both=lambda: DataLoader(NoisyStream(), 2, transform=Jitter()))
every_home = {f'{h}-{o}': (lambda h=h, o=o: homes[h](**orders[o](8 if h=='subset' else 12))) for h in homes for o in orders if (h,o)!=('subset','numpy')}

@pytest.mark.parametrize('new', [*every_home.values(), *streams.values()], ids=[*every_home, *streams])
@pytest.mark.parametrize('k', [0,2])
def test_generators_wherever_they_are(new, k):
    "Of the dataset, within another or within a transform, beside any order: items and order go on as if there had been no stop"
    torch.manual_seed(0)
    dl = new(); list(dl)
    it = iter(dl)
    for _ in range(k): next(it)
    state = json.loads(json.dumps(dl.state_dict()))
    want = as_lists(it),as_lists(dl)
    torch.manual_seed(9)
    other = new(); list(other); list(other)
    other.load_state_dict(state)
    assert (as_lists(other),as_lists(other))==want

def test_state_of_a_dataset_inside_a_subset():
    def new(): return DataLoader(tud.Subset(Wearing(12, None), range(8)), 2)
    dl = new(); it = iter(dl); next(it)
    other = new(); other.load_state_dict(dl.state_dict())
    assert as_lists(other)==as_lists(it)

@linux
def test_generators_that_workers_move():
    for ds in (Through(), subset()):
        dl = DataLoader(ds, 2, num_workers=1); it = iter(dl); next(it)
        with pytest.raises(ValueError, match='num_workers=0'): dl.state_dict()
    def new(): return DataLoader(list(range(12)), 2, num_workers=1, transform=Jitter())       # drawn from in this process
    dl = new(); it = iter(dl); next(it)
    other = new(); other.load_state_dict(dl.state_dict())
    assert as_lists(other)==as_lists(it)

def test_long_lists_are_not_searched():
    ds = Items(12, None); ds.rows = [Jitter() for _ in range(100_000)]
    start = time.process_time()
    assert DataLoader(ds, 2).state_dict()['generators']==0 and time.process_time()-start<1

@linux
def test_persistent_workers_leave_no_generator_running():
    "One that is still there when the process forks anew would be run twice, and fail with a traceback on stderr"
    dls = [DataLoader(list(range(24)), 4, num_workers=2, persistent_workers=True) for _ in range(2)]
    for dl in dls*2:
        for stop in (2,99):
            for i,_ in enumerate(dl):
                if i==stop: break
            assert dl._pool.dataset.todo is None

@pytest.mark.parametrize('dtype', [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_tensors_shuffled(dtype):
    x = torch.arange(12).to(dtype)
    assert sorted(torch.cat([xb.long() for xb in DataLoader(x, 5, shuffle=True)]).tolist())==list(range(12))
