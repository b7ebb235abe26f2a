"A run killed at any moment ends with the weights it would have had"
import json, math, os, random, resource, shutil, signal, subprocess, sys, time, zipfile
from collections import Counter, OrderedDict
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as L
import minibatch.checkpoint as C
from minibatch.all import *

def data(n=70, n_in=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_in, generator=g),torch.randint(0, 3, (n,), generator=g)

def net(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8,3))

TheirDl = torch.utils.data.DataLoader
def setup(bs=8, seed=1, n=70, shuffle=True, Opt=SGD, Dl=DataLoader, **kw):
    model = net(seed)
    opt = Opt(model.parameters(), lr=0.1, momentum=0.9)
    return model,F.cross_entropy,opt,Dl(torch.utils.data.TensorDataset(*data(n)), bs, shuffle=shuffle, **kw)

def weights(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k],b[k]) for k in a)
quiet = dict(progress=False)

class At(Callback):
    "Calls f(run) after so many batches of the run"
    def __init__(self, n, f): self.n,self.f = n,f
    def after_batch(self, run):
        self.n -= 1
        if not self.n: self.f(run)

def ctrl_c(run): signal.raise_signal(signal.SIGINT)
def interrupted(*args, **kw):
    with pytest.raises(KeyboardInterrupt): fit(*args, **kw)

# The victim: a forked copy of a process that has imported everything, trains a little, and is killed on the way

class Noise(Callback):
    "Uses Python's and numpy's random numbers, which have to be restored too"
    def before_batch(self, run): run.xb[0] = run.xb[0] + random.gauss(0,.1) + np.random.randn()*.1

def die(): os.kill(os.getpid(), signal.SIGKILL)

def bomb(how, n):
    "Kill this process at the `n`th call of anything ('run'), inside `_save` ('save'), or while a file is half written ('torn')"
    left,inside,me = n,0,os.getpid()
    def count(frame, event, arg):
        nonlocal left,inside
        if frame.f_code is C._save.__code__: inside += (event=='call')-(event=='return')
        if how=='run' or inside: left -= 1
        if left<0 and os.getpid()==me: die()          # workers inherit this
    if how in ('run','save'): sys.setprofile(count)
    sync = os.fsync
    def fsync(fd):
        nonlocal left
        left -= 1
        if left<0:
            if os.readlink(f'/proc/self/fd/{fd}').endswith('.tmp'): os.ftruncate(fd, n*97%os.fstat(fd).st_size)
            die()
        sync(fd)
    if how=='torn': os.fsync = fsync
    return lambda: n-left                   # calls so far

def job(folder, loader, workers, how='', n=0):
    "Train from start to end; leaves what came out in `folder`/final.pt"
    torch.set_num_threads(1)
    torch.manual_seed(3); random.seed(3); np.random.seed(3)
    model,loss_func,opt,dl = setup(Dl=dict(ours=DataLoader, torch=TheirDl)[loader], num_workers=workers)
    h,sched = History(),L.OneCycleLR(opt, 0.2, total_steps=100)
    cbs = [Noise(), h, Schedule(sched), ClipGrad(1.), Accumulate(2)]
    if how=='full': cbs.append(At(n, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))))
    ckpt = Checkpoint(f'{folder}/run.ckpt', **(dict(share=0.5) if n%3==0 else dict(every=2)))
    calls = bomb(how, n)
    fit(4, model, loss_func, opt, dl, [tuple(data(20, seed=5))], cbs=[*cbs, ckpt], **quiet)
    sys.setprofile(None)
    rows = [{k:v for k,v in r.items() if k!='seconds'} for r in h.rows]
    torch.save(dict(model=model.state_dict(), opt=opt.state_dict(), rows=rows, lr=opt.param_groups[0]['lr'], calls=calls()),
               f'{folder}/final.pt')

def serve():
    "For each line of JSON, fork a job, and tell how it ended"
    for line in sys.stdin:
        args = json.loads(line)
        if not (pid := os.fork()):
            os.setsid()
            sys.stdin.close(); os.dup2(os.open(f'{args[0]}/log', os.O_WRONLY|os.O_CREAT|os.O_APPEND), 1); os.dup2(1, 2)
            try: job(*args); os._exit(0)
            except BaseException as e: print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True); os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

if __name__=='__main__': serve(); sys.exit()

import pytest
from hypothesis import given, settings, strategies as st

@pytest.fixture(scope='module')
def victims():
    "A function that runs a `job` and returns its exit status"
    path = os.pathsep.join([str(Path(C.__file__).parents[1]), os.environ.get('PYTHONPATH','')])
    p = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=path))
    def run(folder, loader='ours', workers=0, how='', n=1):
        folder.mkdir(exist_ok=True)
        print(json.dumps([str(folder), loader, workers, how, n]), file=p.stdin, flush=True)
        return int(p.stdout.readline())
    yield run
    p.stdin.close(); p.wait()

def final(folder):
    s = torch.load(folder/'final.pt', weights_only=True)
    flat = dict(s['model'], **{f'{i}{k}':v for i,d in s['opt']['state'].items() for k,v in d.items()})
    return flat,(s['rows'],s['lr']),s['calls']

@pytest.mark.parametrize('loader,workers,kills', [('ours',0,52), ('ours',2,20), ('torch',0,20), ('torch',2,8)])
def test_killed_anywhere(victims, tmp_path, loader, workers, kills):
    def whole(how):
        assert victims(tmp_path/how, loader, workers, how, 10**9)==0, (tmp_path/how/'log').read_text()
        return final(tmp_path/how)
    calls = {how: whole(how)[2] for how in ('run','save','torn')}
    want,rest,_ = final(tmp_path/'run')
    r,killed,i = random.Random(kills),Counter(),0
    while killed.total()<kills:
        folder,i = tmp_path/f'{i}',i+1
        for _ in range(4):
            how = r.choice([*calls])
            status = victims(folder, loader, workers, how, r.randrange(calls[how]//2))
            assert status in (0,-9), (folder/'log').read_text()
            killed[how] += status==-9
        assert victims(folder, loader, workers)==0, (folder/'log').read_text()
        got,grest,_ = final(folder)
        assert same(want, got) and rest==grest
    assert min(killed.values())>=kills//8

def test_seeds_matter(victims, tmp_path):       # the comparison above can fail
    victims(tmp_path/'a'); victims(tmp_path/'b', 'torch')
    a,b = final(tmp_path/'a'),final(tmp_path/'b')
    assert not same(a[0], b[0]) and a[1]!=b[1]

def test_full_disk(victims, tmp_path):
    victims(tmp_path/'whole')
    assert victims(tmp_path/'full', how='full', n=13)==1
    log = (tmp_path/'full'/'log').read_text()
    assert 'Checkpoint.after_batch failed' in log and 'File too large: no checkpoint could be written' in log
    assert sorted(f.name for f in (tmp_path/'full').iterdir())==['log','run.ckpt']
    assert C._read(tmp_path/'full'/'run.ckpt')['batch']==2
    assert victims(tmp_path/'full')==0
    assert same(final(tmp_path/'full')[0], final(tmp_path/'whole')[0])

# What is written

class Stop(Callback):
    "Does what Ctrl-C does"
    def __init__(self, epoch, batch): self.at = epoch,batch
    def after_batch(self, run):
        if (run.epoch,run.batch)==self.at: ctrl_c(run)

def test_ctrl_c(tmp_path, capsys):
    whole,h,path = setup(),History(),tmp_path/'sub'/'run.ckpt'
    fit(3, *whole, **quiet)
    args = setup()
    interrupted(3, *args, cbs=[h, Stop(1,5), Checkpoint(path, 2)], **quiet)
    assert 'Interrupted in epoch 2 after batch 5' in capsys.readouterr().out
    assert len(h.rows)==1 and os.listdir(tmp_path/'sub')==['run.ckpt']
    s = torch.load(path, weights_only=True)
    assert (s['epoch'],s['batch'])==(1,4)
    args,h = setup(seed=9),History()
    fit(3, *args, cbs=[h, Checkpoint(path, 2)], **quiet)
    assert same(weights(whole[0]), weights(args[0])) and [r['epoch'] for r in h.rows]==[1,2,3]
    assert 'run.ckpt: going on after 1 epochs and 4 batches' in capsys.readouterr().out

def test_finished_and_longer(tmp_path):
    path,whole = tmp_path/'c',setup()
    fit(4, *whole, **quiet)
    args = setup(); figs = fit(2, *args, cbs=Checkpoint(path), **quiet)
    again = setup(seed=5)
    assert fit(2, *again, cbs=Checkpoint(path), **quiet)==figs and same(weights(args[0]), weights(again[0]))     # nothing left to do
    fit(4, *again, cbs=Checkpoint(path), **quiet)
    assert same(weights(whole[0]), weights(again[0]))
    stop = lambda: [EarlyStop('train_loss', 1, max), Checkpoint(tmp_path/'d')]
    args,h = setup(),History(); fit(9, *args, cbs=[h,*stop()], **quiet)
    h2 = History(); fit(9, *setup(), cbs=[h2,*stop()], **quiet)
    assert len(h.rows)==len(h2.rows)<9                  # a run that was stopped stays stopped

def test_says_what_it_found(tmp_path, capsys):
    def go(epochs, *cbs, lr=0.1, sched=None):
        args = setup()
        args[2].param_groups[0]['lr'] = lr
        cbs = [*cbs, *([Schedule(sched(args[2]))] if sched else [])]
        fit(epochs, *args, cbs=[*cbs, Checkpoint(tmp_path/'c', every=2)], **quiet)
        return capsys.readouterr().out,args[2].param_groups[0]['lr']
    assert go(2)==('',0.1)
    out,lr = go(2)
    assert 'the run of 2 epochs is finished; nothing is left to do. Remove the file' in out and lr==0.1
    out,lr = go(3, lr=0.05)
    assert 'a finished run of 2 epochs, going on to 3' in out and 'the learning rate stays [0.1]' in out and '[0.05] is for a new run' in out and lr==0.1
    (tmp_path/'c').unlink()
    class Stop(Callback):
        def after_epoch(self, run): run.stop = run.epoch==1
    go(4, Stop())
    assert 'stopped by a callback after 1 epochs; nothing is left to do' in go(4, Stop())[0]
    for sched in (lambda o: L.OneCycleLR(o, 0.1, total_steps=2*9), lambda o: L.CosineAnnealingLR(o, 2*9)):
        (tmp_path/'c').unlink()
        go(2, sched=sched)
        with pytest.raises(RuntimeError, match='of 18 steps at its end, so there is no learning rate for 3 epochs'): go(3, sched=sched)
    (tmp_path/'c').unlink()
    go(2, sched=lambda o: L.StepLR(o, 5))              # has no end
    assert 'going on to 3' in go(3, sched=lambda o: L.StepLR(o, 5))[0]

def test_share(tmp_path, monkeypatch):
    now,saved,save = [0.],[],C._save
    def slow(state, path): saved.append((state['epoch'],state['batch'])); now[0] += 1; save(state, path)
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(C, '_save', slow)
    def second(run): now[0] += 1
    clock = lambda: [At(i, second) for i in range(1,50)]
    fit(4, *setup(), cbs=[*clock(), Checkpoint(tmp_path/'c', share=0.1)], **quiet)     # a batch takes a second, and so does a save
    assert saved==[(0,0), (1,1), (2,2), (3,3), (4,0)]   # the trial, one every ten seconds, and the end
    del saved[:]; fit(5, *setup(), cbs=[*clock(), Checkpoint(tmp_path/'c', share=1)], **quiet)
    assert saved==[*((4,i) for i in range(1,10)), (5,0)]                        # the first comes at once, to see what it costs today
    del saved[:]; fit(2, *setup(), cbs=[*clock(), Checkpoint(tmp_path/'d', every=6)], **quiet)
    assert saved==[(0,0), (0,6), (1,0), (1,6), (2,0)]

def test_a_stop_is_written(tmp_path):
    def stop(run): run.stop = True
    fit(3, *setup(), cbs=[At(13, stop), Checkpoint(tmp_path/'c', every=9)], **quiet)
    s = C._read(tmp_path/'c')
    assert (s['epoch'],s['batch'],s['stop'])==(1,4,True)

def test_a_failed_run_leaves_what_can_be_resumed(tmp_path):
    def spoil(run): run.model[0].weight.data[0] = math.nan
    with pytest.raises(RuntimeError, match='loss is nan'): fit(3, *setup(), cbs=[At(14, spoil), Checkpoint(tmp_path/'c', every=2)], **quiet)
    s = C._read(tmp_path/'c')                           # batch 6 was due, but its loss was nan
    assert (s['epoch'],s['batch'])==(1,4)
    with pytest.raises(RuntimeError, match='loss is nan'): fit(1, *setup(), cbs=[At(1, spoil), Checkpoint(tmp_path/'d')], **quiet)
    assert os.listdir(tmp_path)==['c']                  # what was tried at the start is gone

class Odd(Callback):
    "Has a state that is given"
    def __init__(self, *states): self.states,self.got = iter(states),None
    def state_dict(self): return next(self.states)
    def load_state_dict(self, s): self.got = s

def test_numpy_numbers(tmp_path):       # from update 8 on
    warm = lambda i: (i+1)/8 if i<8 else .5*(1+np.cos(np.pi*(i-8)/40))
    def go(epochs, *cbs):
        args = setup()
        fit(epochs, *args, cbs=[Schedule(L.LambdaLR(args[2], warm)), *cbs], **quiet)
        return weights(args[0])
    go(3, Checkpoint(tmp_path/'c', every=1))
    assert type(C._read(tmp_path/'c')['cbs'][0]['_last_lr'][0]) is float
    assert same(go(6), go(6, Checkpoint(tmp_path/'c')))

def test_found_when_it_is_written(tmp_path):
    for bad in np.ones(2), {1: lambda: 0}, [Path('x')], (1,object()), net(), Counter(a=np.float64(1)):
        at = {dict:'.1', list:'[0]', tuple:'[1]'}.get(type(bad), '')
        fine = [dict(v=1.)]*3           # for the trial and two batches
        with pytest.raises(RuntimeError, match=rf'Checkpoint.after_batch failed after 0 epochs and 3 batches.*state.cbs\[0\].v{at.replace("[",chr(92)+"[")} is of type'):
            fit(1, *setup(), cbs=[Odd(*fine, dict(v=bad)), Checkpoint(tmp_path/'c', every=1)], **quiet)
        assert C._read(tmp_path/'c')['batch']==2 and os.listdir(tmp_path)==['c']
        (tmp_path/'c').unlink()
    with pytest.raises(RuntimeError, match='Checkpoint.before_fit.*state.cbs'):
        fit(1, *setup(), cbs=[Odd(dict(v=np.ones(2))), Checkpoint(tmp_path/'c')], **quiet)
    assert os.listdir(tmp_path)==[]

dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.half, torch.int64, torch.uint8, torch.bool, torch.cfloat, torch.uint16]
numbers = st.floats(width=32).map(np.float32) | st.floats().map(np.float64) | st.integers(-9,9).map(np.int16) | st.booleans().map(np.bool_) | st.text().map(np.str_)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers() | numbers \
      | st.sampled_from([*dtypes, torch.device('cpu'), torch.Size([2,3]), Counter('aab'), {1,2}])

@settings(max_examples=100, deadline=None)
@given(st.data())
def test_all_that_is_written_can_be_read(tmp_path_factory, sample):
    keys = st.text() | st.integers() | st.integers(-9,9).map(np.int64)
    nest = lambda s: st.lists(s) | st.tuples(s,s) | st.dictionaries(keys, s) | st.dictionaries(st.text(), s).map(OrderedDict)
    ts = [torch.arange(24.).to(sample.draw(st.sampled_from(dtypes))).view(2,3,4)[:,::sample.draw(st.integers(1,2))].transpose(0,2) for _ in range(3)]
    o = dict(ts=ts, row=ts[0][0], plain=sample.draw(st.recursive(plain, nest, max_leaves=10)), model=net().state_dict(), format=C._format)
    path = tmp_path_factory.getbasetemp()/'readable'
    C._save(C._plain(o), path)
    s = C._read(path)
    def python(o):
        if isinstance(o, np.generic): return o.item()
        if type(o) in (list,tuple): return type(o)(map(python, o))
        if isinstance(o, dict) and type(o) is not Counter: return type(o)((python(k),python(v)) for k,v in o.items())
        return o
    assert repr(s['plain'])==repr(python(o['plain'])) and s['model']._metadata==o['model']._metadata and same(s['model'], o['model'])
    for x,y in zip(ts, s['ts'], strict=True): assert x.dtype==y.dtype and x.stride()==y.stride() and torch.equal(x, y)
    s['ts'][0].zero_(); assert not s['row'].any()       # still the same memory

# What is read

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('good')/'c'
    fit(2, *setup(), cbs=Checkpoint(path), **quiet)
    return path.read_bytes()

def flat(o): return repr([o.tolist() if isinstance(o, torch.Tensor) else o for o in torch.utils._pytree.tree_leaves(o)])

@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged(good, tmp_path_factory, sample):
    path,tail = tmp_path_factory.getbasetemp()/'damaged',good.index(b'PK\x01\x02')     # the list of the archive's parts, behind them
    i,cut = sample.draw(st.integers(0, len(good)-1)|st.integers(tail, len(good)-1)),sample.draw(st.booleans())
    bad = good[:i] if cut else good[:i]+bytes([good[i]^sample.draw(st.integers(1,255))])+good[i+1:]
    path.write_bytes(bad)
    try: s = C._read(path)
    except ValueError as e: assert 'remove it to begin anew' in str(e) and ('damaged' in str(e) or i<2) and path.exists()
    else:
        assert not cut                                  # a byte that stands for nothing
        path.write_bytes(good); assert flat(s)==flat(C._read(path))

def test_a_part_marked_as_a_folder(good, tmp_path):     # `torch.load` gives what its memory held, and `testzip` is silent
    i = good.index(b'PK\x01\x02')
    while b'/data/' not in good[i:i+80]: i = good.index(b'PK\x01\x02', i+1)
    (tmp_path/'c').write_bytes(good[:i+38]+b'\x10'+good[i+39:])
    with zipfile.ZipFile(tmp_path/'c') as z: assert z.testzip() is None
    with pytest.raises(ValueError, match='c is damaged'): C._read(tmp_path/'c')

@pytest.mark.parametrize('what', ['old', 'weights', 'text', 'nothing', 'zip'])
def test_not_a_checkpoint(tmp_path, what):
    f,state = tmp_path/'f',dict(epoch=1, batch=0)
    if what=='old':                                     # the first version's: an old format of PyTorch's, and a checksum behind it
        torch.save(state, f, _use_new_zipfile_serialization=False)
        f.write_bytes(f.read_bytes()+b'abcd')
    if what=='weights': torch.save(net().state_dict(), f)
    if what=='text': f.write_text('weights')
    if what=='nothing': f.touch()
    if what=='zip':
        with zipfile.ZipFile(f, 'w') as z: z.writestr('a', 'b')
    was = f.read_bytes()
    with pytest.raises(RuntimeError, match='(?s)Checkpoint.before_fit.*or no checkpoint: remove it to begin anew') as e:
        fit(1, *setup(), cbs=Checkpoint(f), **quiet)
    assert ('f is of an older version of minibatch' in str(e.value))==(what!='zip') and f.read_bytes()==was

def test_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return Path.touch,(tmp_path/'done',)
    torch.save(dict(epoch=Evil(), format=C._format), tmp_path/'c')
    with pytest.raises(ValueError, match='no checkpoint'): C._read(tmp_path/'c')
    assert not (tmp_path/'done').exists()
    torch.load(tmp_path/'c', weights_only=False); assert (tmp_path/'done').exists()      # it would have been run

@pytest.mark.parametrize('changed,msg', [(dict(bs=4),'there batch_size is 8, here 4'), (dict(n=60),'there examples is 70, here 60'),
    (dict(model=nn.Sequential(nn.Linear(6,3))),'weights 0.weight is '), (dict(Opt=torch.optim.RMSprop),'optimizer is SGD, here RMSprop'),
    (dict(cbs=[History()]),r"callbacks is \[\], here \['History'\]"), (dict(shuffle=False),'shuffle')])
def test_other_run(tmp_path, changed, msg):
    fit(2, *setup(), cbs=Checkpoint(tmp_path/'c'), **quiet)
    changed = dict(changed)
    cbs,model = changed.pop('cbs',[]),changed.pop('model',None)
    args = list(setup(**changed))
    if model: args[0],args[2] = model,SGD(model.parameters(), 0.1)
    before,was = weights(args[0]),(tmp_path/'c').read_bytes()
    with pytest.raises(RuntimeError, match=f'(?s)Checkpoint.before_fit.*{msg}'): fit(2, *args, cbs=[*cbs, Checkpoint(tmp_path/'c')], **quiet)
    assert same(before, weights(args[0])) and (tmp_path/'c').read_bytes()==was

def test_other_scheduler(tmp_path):
    def go(make): args = setup(); fit(1, *args, cbs=[Schedule(make(args[2])), Checkpoint(tmp_path/'c')], **quiet)
    go(lambda o: L.StepLR(o, 7))
    with pytest.raises(RuntimeError, match=r"callbacks is \['StepLR'\], here \['ExponentialLR'\]"): go(lambda o: L.ExponentialLR(o, .9))

# Where it is written

@pytest.mark.skipif(os.name=='nt', reason='another order there')
def test_written_in_this_order(tmp_path, monkeypatch):
    seen = []
    def spy(name):
        real = getattr(os, name)
        def f(a, *rest): seen.append((name, Path(os.readlink(f'/proc/self/fd/{a}') if name=='fsync' else a).name)); return real(a, *rest)
        monkeypatch.setattr(os, name, f)
    spy('fsync'); spy('replace')
    C._save([1], tmp_path/'c')
    assert seen==[('fsync','c.tmp'), ('replace','c.tmp'), ('fsync',tmp_path.name)]

@pytest.mark.parametrize('error', [OSError(5,'broken'), KeyboardInterrupt()])
@pytest.mark.parametrize('where', ['fsync','replace'])
def test_a_write_that_fails(tmp_path, monkeypatch, error, where):
    C._save([1], tmp_path/'c')
    def fail(*args): raise error
    monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)) as e: C._save([2], tmp_path/'c')
    monkeypatch.undo()
    assert isinstance(error, KeyboardInterrupt) or 'broken: no checkpoint could be written' in str(e.value)
    assert torch.load(tmp_path/'c')==[1] and os.listdir(tmp_path)==['c']

def test_paths(tmp_path):
    def no(match, *cbs, args=None):
        with pytest.raises(RuntimeError, match='(?is)Checkpoint.before_fit failed after 0 epochs.*'+match): fit(1, *(args or setup()), cbs=cbs, **quiet)
    no('is a folder: expected', Checkpoint(tmp_path))
    (tmp_path/'file').touch(); no('file', Checkpoint(tmp_path/'file'/'c'))
    no('too long', Checkpoint(tmp_path/('x'*250 + '.ckpt')))
    no('2 Checkpoints', Checkpoint(tmp_path/'a'), Checkpoint(tmp_path/'b'))
    no('LRFinder puts everything back', LRFinder(), Checkpoint(tmp_path/'x'))
    no('workers that outlive', Checkpoint(tmp_path/'a'), args=setup(Dl=TheirDl, num_workers=1, persistent_workers=True))
    assert [p.name for p in tmp_path.iterdir()]==['file']
    with pytest.raises(ValueError, match='every is 0'): Checkpoint(tmp_path/'x', every=0)
    for share in 0, 2, math.nan:
        with pytest.raises(ValueError, match=f'share is {share}'): Checkpoint(tmp_path/'x', share=share)

def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(1, *setup(), cbs=Checkpoint('c'), **quiet)
    assert C._read('c')['epoch']==1

# What goes on

def test_seconds_go_on(tmp_path, monkeypatch):
    now = [0.]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    class Tick(Callback):
        def __init__(self, d): self.d = d
        def after_batch(self, run): now[0] += self.d
    def go(tick, *cbs):
        h = History()
        fit(1, *setup(), cbs=[h, Tick(tick), Checkpoint(tmp_path/'c', 2), *cbs], **quiet)
        return h.rows
    with pytest.raises(KeyboardInterrupt): go(10, At(5, ctrl_c))                               # 4 of 9 batches are in the file, 40 s
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
    with pytest.raises(KeyboardInterrupt): go(1, Checkpoint(tmp_path/'c', 2), At(14, ctrl_c))
    b = go(5, Checkpoint(tmp_path/'c', 2))
    assert same(a[0], b[0]) and torch.equal(a[1], b[1])
    with pytest.raises(RuntimeError, match=r'others is \[\[3, 3\]\], here \[\]'): fit(3, *setup(), cbs=Checkpoint(tmp_path/'c'), **quiet)

@pytest.mark.parametrize('where', ['loader','sampler','batch_sampler','ours'])
def test_generators_of_samplers(tmp_path, where):
    def go(seed, *cbs):
        torch.manual_seed(1)
        args,g,tud = list(setup(seed=seed)),torch.Generator().manual_seed(seed),torch.utils.data
        ds = args[3].dataset
        s = tud.RandomSampler(ds, generator=g)
        args[3] = dict(loader=lambda: tud.DataLoader(ds, 8, shuffle=True, generator=g), sampler=lambda: tud.DataLoader(ds, 8, sampler=s),
                       batch_sampler=lambda: tud.DataLoader(ds, batch_sampler=tud.BatchSampler(s, 8, False)),
                       ours=lambda: DataLoader(ds, 8, sampler=s))[where]()
        torch.manual_seed(2); fit(3, *args, cbs=cbs, **quiet)
        return weights(args[0])
    a = go(1)
    with pytest.raises(KeyboardInterrupt): go(1, Checkpoint(tmp_path/'c', 2), At(14, ctrl_c))
    assert same(a, go(5, Checkpoint(tmp_path/'c', 2)))
    go(1, Checkpoint(tmp_path/'d'))
    assert same(a, go(7, Checkpoint(tmp_path/'d')))

def test_persistent_workers(tmp_path):
    def go(*cbs, seed=1):
        torch.manual_seed(0); args = setup(seed=seed, n=40, num_workers=1, persistent_workers=True)
        torch.manual_seed(0); fit(3, *args, cbs=cbs, **quiet)
        return weights(args[0])
    a = go()
    with pytest.raises(KeyboardInterrupt): go(Checkpoint(tmp_path/'c', 2), At(8, ctrl_c))
    assert same(a, go(Checkpoint(tmp_path/'c', 2), seed=5))

@pytest.mark.parametrize('loader', ['ours','torch','list','generators'])
@pytest.mark.parametrize('opt', [torch.optim.AdamW, lambda ps,lr,momentum: torch.optim.SGD(ps, lr, momentum, nesterov=True)])
def test_resume_with(tmp_path, loader, opt):
    class Gens:     # any iterable: draws its batches from the global generator
        def __iter__(self): return ((torch.randn(5,6),torch.randint(0,3,(5,))) for _ in range(9))
    def make(seed):
        O = (lambda ps,lr,momentum: opt(ps, lr)) if opt is torch.optim.AdamW else opt
        if loader=='torch': return setup(seed=seed, Opt=O, Dl=TheirDl, generator=torch.Generator().manual_seed(4))
        a = setup(seed=seed, Opt=O)
        return a if loader=='ours' else (*a[:3], list(a[3]) if loader=='list' else Gens())
    torch.manual_seed(0)
    whole = make(1); fit(3, *whole, cbs=[AMP(), EarlyStop('train_loss')], **quiet)
    torch.manual_seed(0)
    args = make(1)
    with pytest.raises(KeyboardInterrupt): fit(3, *args, cbs=[AMP(), EarlyStop('train_loss'), Checkpoint(tmp_path/'c', 3), At(17, ctrl_c)], **quiet)
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
    def go(*cbs):
        args = setup(seed=1)
        fit(3, *args, cbs=[Schedule(SCHEDS[sched](args[2])), *cbs], **quiet)
        return weights(args[0]),args[2].param_groups[0]['lr']
    a = go()
    with pytest.raises(KeyboardInterrupt): go(Checkpoint(tmp_path/'c', 2), At(14, ctrl_c))
    b = go(Checkpoint(tmp_path/'c', 2))
    assert same(a[0], b[0]) and a[1]==b[1]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_cuda(tmp_path):
    def make(seed=1):
        a = setup(seed=seed); a[0].cuda()
        return a
    whole = make(); fit(3, *whole, [data()], cbs=AMP(), **quiet)
    args = make()
    with pytest.raises(KeyboardInterrupt): fit(3, *args, [data()], cbs=[AMP(), Checkpoint(tmp_path/'c', 2), At(14, ctrl_c)], **quiet)
    args = make(7); fit(3, *args, [data()], cbs=[AMP(), Checkpoint(tmp_path/'c', 2)], **quiet)
    assert same(weights(whole[0]), weights(args[0])) and args[0][0].weight.is_cuda

# Where the loader is, and what else there is to keep

import itertools

def goes_on(tmp_path, make, at, epochs=3, **kw):
    "A run stopped after batch `at` in all and started again ends with the weights and figures of one that was not; the batch it went on from"
    def go(*cbs):
        torch.manual_seed(1); np.random.seed(1)
        args = make(); given = args.pop('cbs', [])
        f = fit(epochs, args['model'], F.cross_entropy, args['opt'], args['dl'], args.get('valid_dl'), cbs=[*given, *cbs], **kw, **quiet)
        return [p.detach().clone() for p in args['model'].parameters()],f
    class Where(Callback):
        order = 150
        def before_epoch(self, run): self.at = getattr(self, 'at', (run.epoch,run.batch))
    late = At(at, ctrl_c); late.order = 150
    want,f = go()
    with pytest.raises(KeyboardInterrupt): go(Checkpoint(tmp_path/'c', 1), late)
    w = Where(); got,g = go(Checkpoint(tmp_path/'c', 1), w)
    assert all(torch.equal(p, q) for p,q in zip(want, got)) and f==g
    return w.at

class Peek(Callback):
    def __init__(self, every=1): self.every = every
    def after_batch(self, run):
        if run.batch%self.every==0: bool(run.batches)
class Look(Callback):
    def after_batch(self, run):
        if run.batch%2==0: evaluate(run.model, run.loss_func, run.train_dl)
class Double(Callback):
    def before_epoch(self, run): run.batches = itertools.chain(run.batches, run.batches)

class Noisy(Dataset):
    "Rows with noise from numpy's global generator"
    def __getitem__(self, i): x,y = super().__getitem__(i); return x+np.random.randn(),y

@pytest.mark.parametrize('Dl', [DataLoader, TheirDl])
@pytest.mark.parametrize('cb,at,on', [(Peek, 2, (0,0)), (Peek, 8, (1,0)), (lambda: Peek(3), 3, (0,2)), (lambda: Peek(3), 4, (0,4)), (Look, 2, None)])
def test_callbacks_that_move_the_loader(tmp_path, Dl, cb, at, on):
    def make(): m = nn.Linear(6,3); return dict(model=m, opt=SGD(m.parameters(), .1), dl=Dl(Noisy(*data(24)), 4, shuffle=True), cbs=[cb()])
    where = goes_on(tmp_path, make, at)
    assert on is None or where==on

@pytest.mark.parametrize('at', [4,5])
@pytest.mark.parametrize('Dl', [DataLoader, TheirDl])
def test_shorter_epochs(tmp_path, Dl, at):
    "Of what is left with our loader, of all with one that has to begin anew"
    class Short(Callback):
        def before_epoch(self, run): run.batches = itertools.islice(run.batches, 4-run.batch*(whole is Dl))
    def make(): m = nn.Linear(6,3); return dict(model=m, opt=SGD(m.parameters(), .1), dl=Dl(Noisy(*data(24)), 4, shuffle=True), cbs=[Short()])
    whole = DataLoader; goes_on(tmp_path, make, at)

def test_an_epoch_that_ends_before_the_replay(tmp_path):
    with pytest.raises(ValueError, match='ends before batch 3.*count from its beginning'): list(C._replay([1,2], 3, [], C._get_rng([]), C._get_rng([])))

def test_two_passes_are_an_epoch(tmp_path):
    def make(): m = nn.Linear(6,3); return dict(model=m, opt=SGD(m.parameters(), .1), dl=DataLoader(Dataset(*data(24)), 4, shuffle=True), cbs=[Double()])
    assert goes_on(tmp_path, make, 8)==(0,6)

def test_training_and_validation_with_one_loader(tmp_path):
    for i,at in enumerate((5,6,7)):
        def make(): m = nn.Linear(6,3); dl = DataLoader(Dataset(*data(24)), 4, shuffle=True); return dict(model=m, opt=SGD(m.parameters(), .1), dl=dl, valid_dl=dl)
        (tmp_path/f'{i}').mkdir(); goes_on(tmp_path/f'{i}', make, at)

class Thaw(Callback):
    def before_epoch(self, run):
        if run.epoch==1: run.model[0].requires_grad_(True); run.model[1].train()
class Own(nn.Module):
    "Keeps a mean that `state_dict` leaves out, and draws from a generator of its own"
    def __init__(self): super().__init__(); self.l = nn.Linear(6,3); self.g = np.random.default_rng(0); self.register_buffer('mean', torch.zeros(6), persistent=False)
    def forward(self, x):
        if self.training: self.mean.mul_(.9).add_(x.mean(0)+self.g.random(), alpha=.1)
        return self.l(x-self.mean)
class OwnNoise(Dataset):
    def __init__(self): super().__init__(*data(24)); self.g = np.random.default_rng(0)
    def __getitem__(self, i): return self.x[i]+float(self.g.normal()),self.y[i]

@pytest.mark.parametrize('what', ['frozen','model','valid'])
@pytest.mark.parametrize('at', [2, 8, 14])
def test_what_is_not_in_state_dicts(tmp_path, what, at):
    def make():
        m = Own() if what=='model' else nn.Sequential(nn.Linear(6,8), nn.BatchNorm1d(8), nn.Linear(8,3))
        if what=='frozen': m[:2].requires_grad_(False); m[1].eval()
        valid_dl = DataLoader(OwnNoise(), 4) if what=='valid' else None
        return dict(model=m, opt=SGD(m.parameters(), .1), dl=DataLoader(Dataset(*data(24)), 4, shuffle=True), valid_dl=valid_dl,
                    cbs=[Thaw()]*(what=='frozen'))
    goes_on(tmp_path, make, at)

def test_another_number_of_frozen_parameters_or_steps(tmp_path):
    def go(frozen, steps):
        args = setup(); args[0][0].requires_grad_(not frozen)
        fit(1, *args, cbs=[Schedule(L.OneCycleLR(args[2], .1, total_steps=steps)), Checkpoint(tmp_path/'c')], **quiet)
    go(True, 20)
    with pytest.raises(RuntimeError, match='frozen is 2, here 0'): go(False, 20)
    with pytest.raises(RuntimeError, match=r'steps is \[\[20\]\], here \[\[30\]\]'): go(True, 30)

def test_learning_rates_of_program_and_file(tmp_path, capsys):
    "Whatever a callback or a plateau has done to the rate, an unchanged program hears nothing of it"
    class Decay(Callback):
        def after_epoch(self, run): run.opt.param_groups[0]['lr'] *= .5
    def go(lr, plateau, *cbs):
        args = setup(); args[2].param_groups[0]['lr'] = lr
        own = Schedule(L.ReduceLROnPlateau(args[2], patience=0, threshold=9), 'epoch') if plateau else Decay()
        fit(4, *args, cbs=[own, Checkpoint(tmp_path/f'{plateau}', 1), *cbs], **quiet)
    for plateau in (False,True):
        for at in (21,8):
            with pytest.raises(KeyboardInterrupt): go(.1, plateau, At(at, ctrl_c))
        out = capsys.readouterr().out
        assert 'going on after 2 epochs' in out and 'learning rate' not in out
        go(.3, plateau)
        assert 'the learning rate stays [0.1], as the run began with; [0.3] is for' in capsys.readouterr().out

def test_schedules_within_schedules_at_their_end(tmp_path):
    def warm(o): return L.SequentialLR(o, [L.LinearLR(o, .1, total_iters=4), L.CosineAnnealingLR(o, 14)], [4])
    def chain(o): return L.ChainedScheduler([L.ConstantLR(o), L.StepLR(o, 9)])
    def go(epochs, sched): args = setup(); fit(epochs, *args, cbs=[Schedule(sched(args[2])), Checkpoint(tmp_path/sched.__name__)], **quiet); return weights(args[0])
    go(2, warm)
    with pytest.raises(RuntimeError, match='of 14 steps at its end'): go(3, warm)
    go(2, chain)
    longer = go(3, chain)
    (tmp_path/'chain').unlink()
    assert same(longer, go(3, chain))

def test_goes_on_from_an_epochs_last_batch_without_a_warning(tmp_path, recwarn):
    def make(): m = nn.Linear(6,3); opt = SGD(m.parameters(), .1); return dict(model=m, opt=opt, dl=DataLoader(Dataset(*data(24)), 4), cbs=[Schedule(L.StepLR(opt, 1), 'epoch')])
    assert goes_on(tmp_path, make, 6)==(0,6)
    assert not [w for w in recwarn if 'lr_scheduler' in str(w.message)]

def test_generators_in_workers_are_refused_before_the_first_batch(tmp_path):
    m = nn.Linear(6,3); dl = DataLoader(OwnNoise(), 4, num_workers=1)
    with pytest.raises(RuntimeError, match='after 0 epochs and 0 batches.*could not go on.*num_workers=0'): fit(1, m, F.cross_entropy, SGD(m.parameters(), .1), dl, cbs=Checkpoint(tmp_path/'c', 1), **quiet)
