"fit and what belongs to it, above all: killed at any moment, it ends with the weights it would have had"
import copy, io, json, math, os, random, resource, signal, subprocess, sys, time, traceback, warnings
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as L
import minibatch.training as T
from minibatch.data import Dataset, DataLoader, get_dls
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
    return model,F.cross_entropy,Opt(model.parameters(), lr=0.1, momentum=0.9),Dl(torch.utils.data.TensorDataset(*data(n)), bs, shuffle=shuffle, **kw)

def weights(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k],b[k]) for k in a)
quiet = dict(progress=False)

# The victim: a forked copy of a process that has imported everything, trains a little, and is killed on the way

class Noise(Callback):
    "Uses Python's and numpy's random numbers, which have to be restored too"
    def before_batch(self, run): run.xb[0] = run.xb[0] + random.gauss(0,.1) + np.random.randn()*.1

class Killer(Callback):
    order = 50
    def __init__(self, how, n): self.how,self.n = how,n
    def before_fit(self, run):
        if self.how=='power': self.folder = next(cb for cb in run.cbs if isinstance(cb, Checkpoint)).path.parent; self.watch()
        if self.how in ('replace','replaced','fsync','torn'): setattr(os, f := 'fsync' if self.how in ('fsync','torn') else 'replace', self.wrap(getattr(os,f)))
    def count(self):
        self.n -= 1
        return self.n<0
    def die(self): os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)
    def wrap(self, f):
        def call(a, *rest):
            if not self.count(): return f(a, *rest)
            if self.how=='torn' and os.readlink(f'/proc/self/fd/{a}').endswith('.tmp'): os.ftruncate(a, self.n**2%500)
            if self.how=='replaced': f(a, *rest)
            self.die()
        return call
    def watch(self):
        "Remember which files are on the disk: those that `fsync` was called for"
        mark,sync = lambda f: (os.stat(f).st_ino, os.stat(f).st_mtime_ns),os.fsync
        self.mark,self.safe = mark,set()
        def fsync(fd): sync(fd); self.safe.add(mark(fd))
        os.fsync = fsync
    def fail(self):
        "A power failure: of what is not on the disk, something is missing"
        os.replace = lambda *_: time.sleep(60)      # the thread that writes comes no further
        time.sleep(0.02)
        for f in self.folder.glob('run.ckpt*'):
            if self.mark(f) not in self.safe: os.truncate(f, f.stat().st_size//3)
        self.die()
    def after_batch(self, run):
        if self.how=='batch' and self.count(): self.die()
        if self.how=='power' and self.count(): self.fail()
        if self.how=='full' and self.count(): resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

def job(folder, loader, workers, how='', n=0):
    "Train from start to end; leaves what came out in `folder`/final.pt"
    torch.set_num_threads(1)
    Checkpoint.pause = (0,0.05,1)[n%3]
    torch.manual_seed(3); random.seed(3); np.random.seed(3)
    model,loss_func,opt,dl = setup(Dl=dict(ours=DataLoader, torch=torch.utils.data.DataLoader)[loader], num_workers=workers)
    h,sched = History(),L.OneCycleLR(opt, 0.2, total_steps=100)
    valid = [tuple(data(20, seed=5))]
    cbs = [Noise(), h, Schedule(sched), ClipGrad(1.), Accumulate(2), Killer(how, n), Checkpoint(f'{folder}/run.ckpt', every=2)]
    fit(4, model, loss_func, opt, dl, valid, cbs=cbs, **quiet)
    rows = [{k:v for k,v in r.items() if k!='seconds'} for r in h.rows]
    torch.save(dict(model=model.state_dict(), opt=opt.state_dict(), rows=rows, lr=opt.param_groups[0]['lr']), f'{folder}/final.pt')

def serve():
    "For each line of JSON, fork a job, kill it after `delay` seconds, and tell how it ended"
    for line in sys.stdin:
        delay,args = json.loads(line)
        start = time.perf_counter()
        if not (pid := os.fork()):
            os.setsid()
            sys.stdin.close(); os.dup2(os.open(f'{args[0]}/log', os.O_WRONLY|os.O_CREAT|os.O_APPEND), 1); os.dup2(1, 2)
            try: job(*args); os._exit(0)
            except BaseException as e: print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True); os._exit(1)
        if delay is not None: time.sleep(delay); os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([status, time.perf_counter()-start]), flush=True)

if __name__=='__main__': serve(); sys.exit()

import pytest
from hypothesis import given, settings, strategies as st

@pytest.fixture(scope='module')
def victims():
    "A function that runs a `job` and returns its exit status and seconds"
    p = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(Path(T.__file__).parents[1]), os.environ.get('PYTHONPATH','')])))
    def run(folder, loader='ours', workers=0, how='', n=0, delay=None):
        folder.mkdir(exist_ok=True)
        print(json.dumps([delay, [str(folder), loader, workers, how, n]]), file=p.stdin, flush=True)
        return json.loads(p.stdout.readline())
    yield run
    p.stdin.close(); p.wait()

def final(folder):
    s = torch.load(folder/'final.pt', weights_only=True)
    flat = dict(s['model'], **{f'{i}{k}':v for i,d in s['opt']['state'].items() for k,v in d.items()})
    return flat,(s['rows'],s['lr'])

@pytest.mark.parametrize('loader,workers,kills', [('ours',0,52), ('ours',2,20), ('torch',0,20), ('torch',2,8)])
def test_killed_anywhere(victims, tmp_path, loader, workers, kills):
    status,secs = victims(tmp_path/'whole', loader, workers)
    assert status==0, (tmp_path/'whole'/'log').read_text()
    want,rest = final(tmp_path/'whole')
    r,killed,i = random.Random(kills),0,0
    while killed<kills:
        folder,i = tmp_path/f'{i}',i+1
        for _ in range(4):
            how = r.choice(['batch','replace','replaced','fsync','torn','power','power','delay'])
            status,_ = victims(folder, loader, workers, delay=r.random()*secs) if how=='delay' else \
                       victims(folder, loader, workers, how, r.randrange(20))
            assert status in (0,-9), (folder/'log').read_text()
            killed += status==-9
        assert victims(folder, loader, workers)[0]==0, (folder/'log').read_text()
        got,grest = final(folder)
        assert same(want, got) and rest==grest
    assert killed>=kills

def test_seeds_matter(victims, tmp_path):       # the comparison above can fail
    victims(tmp_path/'a'); victims(tmp_path/'b', 'torch')
    a,b = final(tmp_path/'a'),final(tmp_path/'b')
    assert not same(a[0], b[0]) and a[1]!=b[1]

def test_full_disk(victims, tmp_path):
    victims(tmp_path/'whole')
    status,_ = victims(tmp_path/'full', how='full', n=13)
    log = (tmp_path/'full'/'log').read_text()
    assert status==1 and 'Checkpoint.' in log and 'no checkpoint could be written' in log and 'Make room' in log
    assert sorted(f.name for f in (tmp_path/'full').iterdir())==['log','run.ckpt','run.ckpt.prev']
    for f in 'run.ckpt','run.ckpt.prev': assert T._read(tmp_path/'full'/f) is not None
    assert victims(tmp_path/'full')[0]==0
    assert same(final(tmp_path/'full')[0], final(tmp_path/'whole')[0])

# Checkpoint

class Stop(Callback):
    "Does what Ctrl-C does"
    def __init__(self, epoch, batch): self.at = epoch,batch
    def after_batch(self, run):
        if (run.epoch,run.batch)==self.at: signal.raise_signal(signal.SIGINT)

def test_ctrl_c(tmp_path, capsys):
    whole,h,path = setup(),History(),tmp_path/'sub'/'run.ckpt'
    fit(3, *whole, **quiet)
    args = setup()
    figs = fit(3, *args, cbs=[h, Stop(1,5), Checkpoint(path, 2)], **quiet)
    assert 'Interrupted in epoch 2 after batch 5' in capsys.readouterr().out
    assert len(h.rows)==1 and figs[0]==h.rows[0]['train_loss'] and not (tmp_path/'sub'/'run.ckpt.tmp').exists()
    s = torch.load(path, weights_only=True)
    assert (s['epoch'],s['batch'])==(1,4)
    args,h = setup(seed=9),History()
    fit(3, *args, cbs=[h, Checkpoint(path, 2)], **quiet)
    assert same(weights(whole[0]), weights(args[0])) and [r['epoch'] for r in h.rows]==[1,2,3]
    assert 'run.ckpt: going on after 1 epochs and 4 batches' in capsys.readouterr().out
    assert all(math.isnan(f) for f in fit(3, *setup(), cbs=Stop(0,1), **quiet))

def test_finished_and_longer(tmp_path):
    path,whole = tmp_path/'c',setup()
    h = History(); fit(4, *whole, cbs=h, **quiet)
    args = setup(); figs = fit(2, *args, cbs=Checkpoint(path), **quiet)
    again = setup(seed=5)
    assert fit(2, *again, cbs=Checkpoint(path), **quiet)==figs and same(weights(args[0]), weights(again[0]))     # nothing left to do
    fit(4, *again, cbs=Checkpoint(path), **quiet)
    assert same(weights(whole[0]), weights(again[0]))
    stop = lambda: [EarlyStop('train_loss', 1, max), Checkpoint(tmp_path/'d')]
    args,h = setup(),History(); fit(9, *args, cbs=[h,*stop()], **quiet)
    h2 = History(); fit(9, *setup(), cbs=[h2,*stop()], **quiet)
    assert len(h.rows)==len(h2.rows)<9                  # a run that was stopped stays stopped

dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.half, torch.int64, torch.uint8, torch.bool, torch.cfloat, torch.uint16]

@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pickled(sample):
    "Reads back as what `torch.save` wrote does: values, types, strides; nested, shared, cut out of something larger"
    def tensor():
        t = (torch.arange(240.)*7%100).to(sample.draw(st.sampled_from(dtypes))).view(sample.draw(st.permutations([2,3,4,10])))
        t = t.permute(sample.draw(st.permutations(range(4))))
        t = t[tuple(slice(sample.draw(st.integers(0,2)), sample.draw(st.integers(1,10)), sample.draw(st.integers(1,2))) for _ in range(4))]
        if sample.draw(st.booleans()): t = t.sum((0,1)) if t.dtype not in (torch.bool,torch.uint16) else t[...,None].expand(*t.shape,2)
        return t.conj() if t.is_complex() and sample.draw(st.booleans()) else t
    ts = [torch.arange(4.)[2:].expand(2,2), *(tensor() for _ in range(sample.draw(st.integers(0,4))))]
    plain = sample.draw(st.recursive(st.none()|st.booleans()|st.integers()|st.floats()|st.text(), lambda s: st.lists(s)|st.dictionaries(st.text()|st.integers(), s), max_leaves=10))
    assert len(T._pickled(ts))<1500+sum(t.nbytes for t in ts)
    o = dict(ts=ts, again=ts[:1], plain=plain, model=net().state_dict())
    torch.save(o, f := io.BytesIO()); f.seek(0)
    a,b = torch.load(f, weights_only=True),torch.load(io.BytesIO(T._pickled(o)), weights_only=True)
    assert repr(a['plain'])==repr(b['plain'])==repr(plain) and a['model']._metadata==b['model']._metadata and same(a['model'], b['model'])
    for x,y,z in zip(ts+ts[:1], a['ts']+a['again'], b['ts']+b['again'], strict=True):
        assert y.dtype==z.dtype and y.shape==z.shape and torch.equal(x, z) and torch.equal(y, z)
        if x.untyped_storage().nbytes()==x.nbytes: assert x.stride()==z.stride()

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged(tmp_path_factory, sample):
    tmp = tmp_path_factory.getbasetemp()/'damaged'
    if not tmp.exists(): tmp.mkdir(); c = Checkpoint(tmp/'c', 4); c.pause = 0; fit(2, *setup(), cbs=c, **quiet)
    good = (tmp/'c').read_bytes()
    i,cut = sample.draw(st.integers(0, len(good)-1)),sample.draw(st.booleans())
    bad = good[:i] if cut else good[:i]+bytes([good[i]^sample.draw(st.integers(1,255))])+good[i+1:]
    (tmp/'x').write_bytes(bad); (tmp/'x.prev').write_bytes((tmp/'c.prev').read_bytes())
    with pytest.warns(UserWarning, match='x is damaged'): s = T._newest(tmp/'x', tmp/'x.prev')
    assert (s['epoch'],s['batch'])==(1,8) and not (tmp/'x').exists()
    (tmp/'x.prev').write_bytes(bad)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='no whole checkpoint'): T._newest(tmp/'x', tmp/'x.prev')
    assert (tmp/'x.prev').exists()                      # it may be somebody else's file

@pytest.mark.parametrize('changed,msg', [(dict(bs=4),'there batch_size is 8, here 4'), (dict(n=60),'there examples is 70, here 60'),
    (dict(model=nn.Sequential(nn.Linear(6,3))),'weights 0.weight is '), (dict(Opt=torch.optim.RMSprop),'optimizer is SGD, here RMSprop'),
    (dict(cbs=[History()]),r"callbacks is \[\], here \['History'\]"), (dict(shuffle=False),'shuffled')])
def test_other_run(tmp_path, changed, msg):
    fit(2, *setup(), cbs=Checkpoint(tmp_path/'c'), **quiet)
    cbs,model = changed.pop('cbs',[]),changed.pop('model',None)
    args = list(setup(**changed))
    if model: args[0],args[2] = model,SGD(model.parameters(), 0.1)
    before,was = weights(args[0]),(tmp_path/'c').read_bytes()
    with pytest.raises(RuntimeError, match=f'(?s)Checkpoint.before_fit.*{msg}'): fit(2, *args, cbs=[*cbs, Checkpoint(tmp_path/'c')], **quiet)
    assert same(before, weights(args[0])) and (tmp_path/'c').read_bytes()==was

def test_not_a_checkpoint(tmp_path):
    torch.save(net().state_dict(), tmp_path/'model.pt')
    was = (tmp_path/'model.pt').read_bytes()
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match='no whole checkpoint'):
        fit(1, *setup(), cbs=Checkpoint(tmp_path/'model.pt'), **quiet)
    assert (tmp_path/'model.pt').read_bytes()==was
    with pytest.raises(ValueError, match='every is 0'): Checkpoint(tmp_path/'x', every=0)
    with pytest.raises(RuntimeError, match='LRFinder puts everything back'): fit(1, *setup(), cbs=[LRFinder(), Checkpoint(tmp_path/'x')], **quiet)

@pytest.mark.skipif(os.name=='nt', reason='another order there')
def test_written_in_this_order(tmp_path, monkeypatch):
    seen = []
    def spy(name):
        real = getattr(os, name)
        def f(a, *rest): seen.append((name, Path(os.readlink(f'/proc/self/fd/{a}') if name=='fsync' else a).name)); return real(a, *rest)
        monkeypatch.setattr(os, name, f)
    (tmp_path/'c').write_bytes(b'old'); spy('fsync'); spy('replace')
    spy('unlink')
    T._write(tmp_path/'c', b'new', tmp_path/'c.prev')
    assert seen==[('fsync','c.tmp'), ('replace','c'), ('replace','c.tmp'), ('fsync',tmp_path.name)]
    del seen[:]; T._write(tmp_path/'c', b'newer', tmp_path/'c.prev', sync=False)
    assert seen==[('replace','c'), ('replace','c.tmp')]
    del seen[:]; T._write(tmp_path/'c', b'newest', tmp_path/'c.prev', safe=False)      # what is in c is not on the disk, what is in c.prev is
    assert seen==[('fsync','c.tmp'), ('replace','c.tmp'), ('fsync',tmp_path.name)]
    assert (bytes(T._read(tmp_path/'c')),bytes(T._read(tmp_path/'c.prev')))==(b'newest',b'new')

@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
@pytest.mark.parametrize('when', ['prev','no prev'])
def test_interrupted_between_names(tmp_path, monkeypatch, error, when):
    c,prev,real = tmp_path/'c',tmp_path/'c.prev',os.replace
    T._write(c, b'old', prev)
    if when=='prev': T._write(c, b'older', prev)
    def fail(a, b): monkeypatch.setattr(os, 'replace', real); raise error
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(error): T._write(c, b'new', prev, safe=False, sync=False)
    assert bytes(T._read(c))==(b'new' if when=='prev' else b'old') and not (tmp_path/'c.tmp').exists()

def test_a_failed_write_is_not_on_the_disk(tmp_path, monkeypatch):
    c = Checkpoint(tmp_path/'c', 1)
    def fail(*a, **k): raise OSError('disk')
    def break_it(run): monkeypatch.setattr(T, '_write', fail); c.synced = -math.inf
    with pytest.raises(RuntimeError, match='disk'): fit(1, *setup(), cbs=[At(4, break_it), c], **quiet)
    assert c.path.exists() and c.safe                  # what was written before the error was sent there at the end
    assert T._newest(c.path, c.prev)['batch']==3

def test_goes_to_the_disk_once_a_second(tmp_path, monkeypatch):
    now,seen,synced,write = [0.],[],[],T._write
    def spy(path, data, prev, safe=True, sync=True): seen.append((round(now[0],1),safe,sync)); write(path, data, prev, safe, sync)
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(T, '_write', spy)
    monkeypatch.setattr(T, '_sync', lambda path: synced.append(path.name))
    class Clock(Callback):
        def before_batch(self, run): c.wait(); now[0] += 0.3
    class Interrupt(Callback):
        def after_batch(self, run): run.stop = run.batch==3
    c = Checkpoint(tmp_path/'c', 1)
    fit(1, *setup(), cbs=[Clock(), c], **quiet)
    # the one after what is on the disk keeps it as `prev`; those that follow replace one another
    assert seen==[(0.3,True,True),(0.6,True,False),(0.9,False,False),(1.2,False,False), (1.5,False,True),(1.8,True,False),(2.1,False,False),
                  (2.4,False,False), (2.7,False,True),(2.7,True,True)]     # and the end of an epoch goes there, too
    assert synced==['c.tmp',tmp_path.name]*4
    del synced[:]; now[0] += 0.1
    fit(2, *setup(), cbs=[Clock(), Interrupt(), c], **quiet)
    assert synced[-2:]==['c',tmp_path.name]                                             # however a run ends, all of it is there

def test_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return Path.touch,(tmp_path/'done',)
    f = io.BytesIO(); torch.save(dict(epoch=Evil()), f)
    T._write(tmp_path/'c', f.getvalue(), tmp_path/'c.prev')
    with pytest.raises(Exception, match='(?i)weights'): T._newest(tmp_path/'c', tmp_path/'c.prev')
    assert not (tmp_path/'done').exists()
    f.seek(0); torch.load(f, weights_only=False); assert (tmp_path/'done').exists()      # it would have been run

def test_paths(tmp_path):
    def no(match, *cbs, args=None):
        with pytest.raises(RuntimeError, match='(?is)Checkpoint.before_fit failed after 0 epochs.*'+match): fit(1, *(args or setup()), cbs=cbs, **quiet)
    no('is a folder: expected', Checkpoint(tmp_path))
    (tmp_path/'file').touch(); no('file', Checkpoint(tmp_path/'file'/'c'))
    no('too long', Checkpoint(tmp_path/('x'*250 + '.ckpt')))
    odd = setup(); odd[2].param_groups[0]['lr'] = np.float64(0.1); no('could be written but not read', Checkpoint(tmp_path/'lr'), args=odd)
    no('two Checkpoints', Checkpoint(tmp_path/'a'), Checkpoint(tmp_path/'b'))
    no('workers that outlive', Checkpoint(tmp_path/'a'), args=setup(Dl=torch.utils.data.DataLoader, num_workers=1, persistent_workers=True))
    assert [p.name for p in tmp_path.iterdir()]==['file']
    with pytest.raises(OSError, match='(?s)no checkpoint.*Mend that') as e: T._write(tmp_path/'no'/'c', b'x', tmp_path/'no'/'p')
    assert 'Make room' not in str(e.value)

def test_seconds_go_on(tmp_path, monkeypatch):
    now = [0.]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    def go(tick, *cbs):
        h = History()
        fit(1, *setup(), cbs=[h, Tick(tick), Checkpoint(tmp_path/'c', 2), *cbs], **quiet)
        return h.rows
    class Tick(Callback):
        def __init__(self, d): self.d = d
        def after_batch(self, run): now[0] += self.d
    go(10, At(5, lambda run: signal.raise_signal(signal.SIGINT)))       # 4 of 9 batches are in the file, 40 s
    now[0] = 1e6
    assert go(1)[0]['seconds']==40+5

class Centers(nn.Module):
    "A loss with parameters of its own"
    def __init__(self): super().__init__(); torch.manual_seed(4); self.c = nn.Parameter(torch.randn(3,3))
    def forward(self, p, y): return F.cross_entropy(p@self.c, y)

def test_parameters_beside_the_model(tmp_path):
    def go(seed, *cbs):
        torch.manual_seed(0); args,loss = list(setup(seed=seed)),Centers()
        if seed!=1: loss.c.data.zero_()
        args[1:3] = loss,SGD([*args[0].parameters(),*loss.parameters()], 0.1, momentum=.9)
        torch.manual_seed(0); fit(3, *args, cbs=cbs, **quiet)
        return weights(args[0]),loss.c.detach().clone()
    a = go(1)
    go(1, Checkpoint(tmp_path/'c', 2), At(14, lambda run: signal.raise_signal(signal.SIGINT)))
    b = go(5, Checkpoint(tmp_path/'c', 2))
    assert same(a[0], b[0]) and torch.equal(a[1], b[1])
    with pytest.raises(RuntimeError, match=r'others is \[\[3, 3\]\], here \[\]'): fit(3, *setup(), cbs=Checkpoint(tmp_path/'c'), **quiet)
    m,loss = nn.Linear(6,3),Centers(); was = loss.c.detach().clone()
    fit(1, m, loss, SGD([*m.parameters(),*loss.parameters()], 1.), [data(8)], cbs=ClipGrad(1e-3), **quiet)
    assert 0<(loss.c.detach()-was).norm()<=1.001e-3

@pytest.mark.parametrize('where', ['loader','sampler','batch_sampler','ours'])
def test_generators_of_samplers(tmp_path, where):
    def go(seed, *cbs):
        torch.manual_seed(1)
        args,g,tud = list(setup(seed=seed)),torch.Generator().manual_seed(seed),torch.utils.data
        ds = args[3].dataset
        s = tud.RandomSampler(ds, generator=g)
        args[3] = dict(loader=lambda: tud.DataLoader(ds, 8, shuffle=True, generator=g), sampler=lambda: tud.DataLoader(ds, 8, sampler=s),
                       batch_sampler=lambda: tud.DataLoader(ds, batch_sampler=tud.BatchSampler(s, 8, False)), ours=lambda: DataLoader(ds, 8, sampler=s))[where]()
        torch.manual_seed(2); fit(3, *args, cbs=cbs, **quiet)
        return weights(args[0])
    a = go(1)
    go(1, Checkpoint(tmp_path/'c', 2), At(14, lambda run: signal.raise_signal(signal.SIGINT)))
    assert same(a, go(5, Checkpoint(tmp_path/'c', 2)))
    go(1, Checkpoint(tmp_path/'d'))
    assert same(a, go(7, Checkpoint(tmp_path/'d')))

def test_persistent_workers(tmp_path):
    def go(*cbs, seed=1):
        torch.manual_seed(0); args = setup(seed=seed, n=40, num_workers=1, persistent_workers=True)
        torch.manual_seed(0); fit(3, *args, cbs=cbs, **quiet)
        return weights(args[0])
    a = go()
    go(Checkpoint(tmp_path/'c', 2), At(8, lambda run: signal.raise_signal(signal.SIGINT)))
    assert same(a, go(Checkpoint(tmp_path/'c', 2), seed=5))

def test_other_scheduler(tmp_path):
    def go(make): args = setup(); fit(1, *args, cbs=[Schedule(make(args[2])), Checkpoint(tmp_path/'c')], **quiet)
    go(lambda o: L.StepLR(o, 7))
    with pytest.raises(RuntimeError, match=r"schedulers is \['StepLR'\], here \['ExponentialLR'\]"): go(lambda o: L.ExponentialLR(o, .9))

class At(Callback):
    "Calls f(run) after so many batches of the run"
    def __init__(self, n, f): self.n,self.f = n,f
    def after_batch(self, run):
        self.n -= 1
        if not self.n: self.f(run)

@pytest.mark.parametrize('loader', ['ours','torch','list','generators'])
@pytest.mark.parametrize('opt', [torch.optim.AdamW, lambda ps,lr,momentum: torch.optim.SGD(ps, lr, momentum, nesterov=True)])
def test_resume_with(tmp_path, loader, opt):
    class Gens:     # any iterable: draws its batches from the global generator
        def __iter__(self): return ((torch.randn(5,6),torch.randint(0,3,(5,))) for _ in range(9))
    def make(seed):
        O = (lambda ps,lr,momentum: opt(ps, lr)) if opt is torch.optim.AdamW else opt
        if loader=='torch': return setup(seed=seed, Opt=O, Dl=torch.utils.data.DataLoader, generator=torch.Generator().manual_seed(4))
        a = setup(seed=seed, Opt=O)
        return a if loader=='ours' else (*a[:3], list(a[3]) if loader=='list' else Gens())
    torch.manual_seed(0)
    whole = make(1); fit(3, *whole, cbs=[AMP(), EarlyStop('train_loss')], **quiet)
    torch.manual_seed(0)
    args = make(1)
    stop = lambda run: signal.raise_signal(signal.SIGINT)
    fit(3, *args, cbs=[AMP(), EarlyStop('train_loss'), Checkpoint(tmp_path/'c', 3), At(17, stop)], **quiet)
    dl = args[3] if loader=='list' else None
    args = make(8)
    if dl: args = (*args[:3], dl)
    fit(3, *args, cbs=[AMP(), EarlyStop('train_loss'), Checkpoint(tmp_path/'c', 3)], **quiet)
    assert same(weights(whole[0]), weights(args[0]))

SCHEDS = [lambda o: L.OneCycleLR(o, 0.1, total_steps=99), lambda o: L.CosineAnnealingLR(o, 30), lambda o: L.StepLR(o, 7), lambda o: L.MultiStepLR(o, [3,9]),
          lambda o: L.LambdaLR(o, lambda i: 1/(1+i)), lambda o: L.ExponentialLR(o, .9), lambda o: L.CyclicLR(o, .01, .1, 5), lambda o: L.PolynomialLR(o, 20),
          lambda o: L.CosineAnnealingWarmRestarts(o, 5), lambda o: L.SequentialLR(o, [L.LinearLR(o, total_iters=4), L.ConstantLR(o)], [6])]

@pytest.mark.parametrize('sched', range(len(SCHEDS)))
def test_schedules(tmp_path, sched):
    lrs = {}
    def go(name, *cbs):
        args = setup(seed=1)
        fit(3, *args, cbs=[Schedule(SCHEDS[sched](args[2])), *cbs], **quiet)
        return weights(args[0]),args[2].param_groups[0]['lr']
    a = go('whole')
    go('part', Checkpoint(tmp_path/'c', 2), At(14, lambda run: signal.raise_signal(signal.SIGINT)))
    b = go('rest', Checkpoint(tmp_path/'c', 2))
    assert same(a[0], b[0]) and a[1]==b[1]
    args = setup(); s = SCHEDS[sched](args[2])          # the loop by hand
    args[0].train()
    for _ in range(3):
        for xb,yb in args[3]: args[1](args[0](xb), yb).backward(); args[2].step(); args[2].zero_grad(); s.step()
    assert same(a[0], weights(args[0])) and a[1]==s.get_last_lr()[0]

def test_schedule_per_epoch():
    args = setup(); s = L.StepLR(args[2], 1, gamma=0.5)
    fit(3, *args, cbs=Schedule(s, 'epoch'), **quiet)
    assert args[2].param_groups[0]['lr']==0.1/8
    args = setup(); s = L.ReduceLROnPlateau(args[2], patience=0, mode='max', factor=0.5)
    h = History(); fit(4, *args, cbs=[Schedule(s, 'epoch'), h], **quiet)
    ref = L.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], 0.1), patience=0, mode='max', factor=0.5)
    for r in h.rows: ref.step(r['train_loss'])
    assert args[2].param_groups[0]['lr']==ref.optimizer.param_groups[0]['lr']
    with pytest.raises(ValueError, match="per is 'step'"): Schedule(s, 'step')
    with pytest.raises(RuntimeError, match='another optimizer'): fit(1, *setup(), cbs=Schedule(s), **quiet)
    with warnings.catch_warnings():                     # stepped only after updates, so that PyTorch has nothing to warn of
        warnings.simplefilter('error')
        args = setup(Opt=torch.optim.SGD); fit(1, *args, cbs=[Schedule(L.StepLR(args[2], 1)), Accumulate(4)], **quiet)
    assert args[2].param_groups[0]['lr']==pytest.approx(0.1*0.1**3)

# fit and evaluate

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
    for bad in (a,), [a], {'x':a}, 3, 'text', (a,b,3.), (a,b,None), (a,b,torch.tensor(1.)), (a,b,{'y':[1]}):
        with pytest.raises((ValueError), match='inputs first and the target last'): fit(1, m:=Two(), F.cross_entropy, SGD(m.parameters(), .1), [bad], **quiet)

@pytest.mark.parametrize('pack', [lambda y,z: dict(y=y, z=z), lambda y,z: (y,z), lambda y,z: [dict(y=y), z]])
def test_nested_targets(pack):
    from torch.utils._pytree import tree_leaves
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
    args = setup(); was = weights(args[0])
    with pytest.raises(RuntimeError, match='two') as e: fit(1, *args, cbs=[A('one'), LRFinder(steps=5), A('two')], **quiet)
    told = ''.join(traceback.format_exception(e.value))
    assert seen==['one','two'] and same(was, weights(args[0])) and "KeyError: 'one'" in told

def test_bad_input():
    model,loss_func,opt,dl = setup()
    def no(match, exc=ValueError, **kw):
        with pytest.raises(exc, match=match): fit(**{**dict(epochs=1, model=model, loss_func=loss_func, opt=opt, train_dl=dl, progress=False), **kw})
    no('epochs is 0', epochs=0)
    no('gave no batches', train_dl=[])
    no('gave no batches', train_dl=(b for b in list(dl)), epochs=2)      # used up after the first epoch
    no('gave no batches', valid_dl=[])
    no('gave no batches', train_dl=DataLoader(dl.dataset, 100, drop_last=True))
    no("none of the model's parameters", model=net())
    no('not a Callback', TypeError, cbs=[History])
    no('a name of its own', metrics=[lambda p,y: 0., lambda p,y: 1.])
    def named(n):
        def f(p, y): return 0.
        f.__name__ = n
        return f
    for n in 'epoch','train_loss','valid_loss','seconds','loss': no('and none of epoch', metrics=named(n))
    for e in 2.5,'3',None: no(f'epochs is {e!r}: expected a whole number', epochs=e)
    for o in None,F.cross_entropy: no('is no optimizer; expected one such as SGD', TypeError, opt=o)
    no('LBFGS', opt=torch.optim.LBFGS(model.parameters()))
    no('loss_func gave a float: 1.0', loss_func=lambda p,y: 1.)
    no('loss_func gave a tuple', loss_func=lambda p,y: (F.cross_entropy(p,y),1))
    no('The loss has no gradient', loss_func=lambda p,y: F.cross_entropy(p.detach(),y))
    frozen = net().requires_grad_(False)
    no('The loss has no gradient', model=frozen, opt=torch.optim.SGD(frozen.parameters(), .1))
    no('got a tuple', metrics=lambda p,y: (1,2))
    assert len(fit(1, model, loss_func, opt, dl, metrics=None, cbs=None, **quiet))==1==len(evaluate(model, loss_func, dl, None))
    with pytest.raises(ValueError, match='steps is 1'): LRFinder(steps=1)
    for f in LRFinder(),(nan := LRFinder()):
        if f is nan: f.lrs,f.losses = [1.],[math.nan]
        for g in f.plot,lambda: f.suggestion:
            with pytest.raises(ValueError, match='no finite loss'): g()
    with pytest.raises(ValueError, match='no rows to plot'): History().plot()
    no(r'loss_func gave a tensor of shape \(8,\)', loss_func=lambda p,y: F.cross_entropy(p, y, reduction='none'))
    no('one number per batch', metrics=[lambda p,y: p.mean(0)])
    with pytest.raises(TypeError, match='Bad.after_bach: there is no such hook'):
        class Bad(Callback):
            def after_bach(self, run): pass

@pytest.mark.parametrize('n', [1,2,99,100,101,250,257])
def test_names_the_bad_batch(n, tmp_path):
    x,y = data(257*2)
    model = nn.Linear(6,3)
    batches = [(a*(math.nan if i==n else 1),b) for i,(a,b) in enumerate(zip(x.split(2), y.split(2)), 1)]
    opt = SGD(model.parameters(), 0.5)
    sched = L.LambdaLR(opt, lambda i: 1/(i+1))
    with pytest.raises(RuntimeError, match=f'The loss is nan in epoch 1, batch {n}, with lr {0.5/n:.4g}. Try a smaller lr'):
        fit(3, model, F.cross_entropy, opt, batches, cbs=[Schedule(sched), Checkpoint(tmp_path/'c', 10)], **quiet)
    if n>10:        # what was saved last is from before
        s = torch.load(tmp_path/'c', weights_only=True)
        assert s['batch']==(n-1)//10*10 and all(v.isfinite().all() for v in s['model'].values())

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

# Callbacks

def test_hooks_and_order():
    seen = []
    def cb(name, order_): return type(name, (Callback,), dict(order=order_, **{h: (lambda h: lambda self,run: seen.append((name,h,run.epoch,run.batch)))(h) for h in Callback.hooks}))()
    x,y = data(4)
    m = nn.Linear(6,3)
    fit(2, m, F.cross_entropy, SGD(m.parameters(), .1), [(x,y)]*2, cbs=[cb('B',1), cb('A',0)], **quiet)
    per_batch = 'before_batch before_backward after_backward after_batch'.split()
    want = ['before_fit', *(['before_epoch', *per_batch*2, 'after_epoch']*2), 'after_fit']
    assert [h for n,h,*_ in seen]==[h for h in want for _ in 'AB'] and [n for n,*_ in seen[:4]]==['A','B']*2
    run = Run(1, m, F.cross_entropy, SGD(m.parameters(), .1), [], cbs=[History()])
    assert [len(getattr(run,h)) for h in Callback.hooks]==[0,0,0,0,0,0,1,0]

@pytest.mark.parametrize('hook', Callback.hooks)
def test_error_names_callback(hook):
    def boom(self, run): raise KeyError('oops')
    args,amp = setup(),AMP()
    with pytest.raises(RuntimeError, match=f'Boom.{hook} failed after [01] epochs and [019] batches: KeyError: .oops.') as e:
        fit(1, *args, cbs=[type('Boom', (Callback,), {hook:boom})(), amp], **quiet)
    assert isinstance(e.value.__cause__, KeyError) and not args[0]._forward_hooks and not args[0]._forward_pre_hooks

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

def test_accumulate_resumes_inside_a_group(tmp_path):
    whole = setup(); fit(2, *whole, cbs=Accumulate(4), **quiet)
    args,again = setup(seed=5),setup()
    fit(2, *again, cbs=[Accumulate(4), Checkpoint(tmp_path/'c', 3), At(16, lambda run: signal.raise_signal(signal.SIGINT))], **quiet)
    assert torch.load(tmp_path/'c', weights_only=True)['cbs'][0]['batches']==2
    fit(2, *args, cbs=[Accumulate(4), Checkpoint(tmp_path/'c', 3)], **quiet)
    assert same(weights(whole[0]), weights(args[0]))
    for n in 0,2.5:
        with pytest.raises(ValueError, match=f'n is {n}'): Accumulate(n)

def test_clip():
    x,y = data(30)
    for norm in .01,.5,1e9:
        a,b = nn.Linear(6,3),nn.Linear(6,3); b.load_state_dict(a.state_dict())
        fit(1, a, F.cross_entropy, SGD(a.parameters(), 1.), [(x,y)], cbs=ClipGrad(norm), **quiet)
        F.cross_entropy(b(x),y).backward(); nn.utils.clip_grad_norm_(b.parameters(), norm); torch.optim.SGD(b.parameters(), 1.).step()
        assert torch.allclose(a.weight, b.weight) and torch.allclose(a.bias, b.bias)

@pytest.mark.parametrize('vals,patience,best,epochs', [([3,2,1,1,1,0],2,None,5), ([3,2,1,1,.5,1,1],3,None,7), ([1,2,3,3,3],2,max,5), ([math.nan]*5,2,None,2), ([1,2,1],5,None,3)])
def test_early_stop(vals, patience, best, epochs):
    es,run = EarlyStop('valid_loss', patience, best),type('R', (), dict(stop=False))()
    for i,v in enumerate(vals, 1):
        run.row = dict(valid_loss=v); es.after_epoch(run)
        new = EarlyStop('valid_loss', patience, best); new.load_state_dict(es.state_dict()); es = new
        if run.stop: break
    assert i==epochs and EarlyStop('accuracy').best is max
    with pytest.raises(ValueError, match="best is 'max'"): EarlyStop('valid_loss', best='max')
    with pytest.raises(RuntimeError, match="no 'acc' in the table"): fit(1, *setup(), cbs=EarlyStop('acc'), **quiet)
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
    fit(1, model, *rest, cbs=[AMP(), AMP(), Copy()], **quiet)
    assert not torch.is_autocast_enabled('cpu') and copies[0][0](data()[0]).dtype==torch.float32
    model.register_forward_hook(lambda m,i,o: 1/0, prepend=False)
    with pytest.raises(ZeroDivisionError): fit(1, model, *rest, cbs=AMP(), **quiet)
    with pytest.raises(RuntimeError): fit(1, m := net(), F.cross_entropy, SGD(m.parameters(), .1), [(torch.randn(2,5),torch.tensor([0,1]))], cbs=AMP(), **quiet)
    assert not torch.is_autocast_enabled('cpu')
    class Pair(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(6,3)
        def forward(self, x): return dict(a=self.l(x), n=3)
    seen,m = [],Pair()
    fit(1, m, lambda p,y: seen.append(p['a'].dtype) or F.cross_entropy(p['a'], y), SGD(m.parameters(), .1), [data(8)], metrics=None, cbs=AMP(), **quiet)
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
    assert [(l.get_label(),[*l.get_xdata()]) for ax in h.plot() for l in ax.get_lines()]==[('train_loss',[1,2,3]), ('train_accuracy',[1]), ('extra',[3])]

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
    import re
    fit(1, *setup(), **quiet)
    assert capfd.readouterr()==('','')
    r = subprocess.run([sys.executable,'-c',SLOW], capture_output=True, text=True, env=ENV)
    assert r.stderr=='' and re.fullmatch(TABLE, r.stdout)

@pytest.mark.parametrize('cols', [40,80])
def test_progress_terminal(cols):
    import fcntl, pty, re, struct, termios
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
    import nbformat, re
    from nbclient import NotebookClient
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLOW)])
    NotebookClient(nb, kernel_name='python3').execute(env=ENV)
    o, = nb.cells[0].outputs
    assert o.output_type=='display_data' and [*o.data]==['text/plain'] and re.fullmatch(TABLE, o.data['text/plain']+'\n')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cuda(tmp_path):
    def make(seed=1):
        a = setup(seed=seed); a[0].cuda()
        return a
    whole = make(); fit(3, *whole, [data()], cbs=AMP(), **quiet)
    args = make(); fit(3, *args, [data()], cbs=[AMP(), Checkpoint(tmp_path/'c', 2), At(14, lambda run: signal.raise_signal(signal.SIGINT))], **quiet)
    args = make(7); fit(3, *args, [data()], cbs=[AMP(), Checkpoint(tmp_path/'c', 2)], **quiet)
    assert same(weights(whole[0]), weights(args[0])) and args[0][0].weight.is_cuda
