"What `check` says of right, wrong and half-finished versions; files and lessons with holes"
import json, math, os, random, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from minibatch import check
from minibatch.check import Piece, Raised, Wrong, pieces

ROOT = Path(__file__).parents[1]
mistakes = [pytest.param(p, f, what, id=f'{p.name}-{i}') for p in pieces.values() for i,(f,what) in enumerate(p.mistakes)]

def message(piece, version):
    with pytest.raises(Wrong) as e: piece(version)
    return str(e.value)

# ---- the pieces

def test_there_are_many_of_them():
    assert len(pieces)>=30 and len(mistakes)>=90

@pytest.mark.parametrize('p', pieces.values(), ids=pieces)
def test_the_reference_is_right_in_all_cases_and_raises_in_none(p, capsys):
    p(p.ref)
    n = len([*p.cases()])
    assert capsys.readouterr().out==f'{p.name}: right, in {n} case{"s"*(n>1)}\n'
    assert not any(isinstance(v, Raised) for o in check._outcomes(p, p.ref) for v in (o, *o.values()))

@pytest.mark.parametrize('p,f,what', mistakes)
def test_each_mistake_is_caught_and_named(p, f, what):
    text = message(p, f)
    assert f'This is what comes out when {what}' in text and 'yours' in text and 'right' in text
    assert f'Read {p.read}' in text

def test_the_sections_exist():
    for p in pieces.values():
        kind,n,section,exercise = re.fullmatch(r'(lesson|appendix) (\d+), (?:"(.*)"|exercise (\d+))', p.read).groups()
        number = f'{int(n):02}' if kind=='lesson' else f'a{n}'
        nb = json.loads(next((ROOT/'nbs').glob(f'{number}_*.ipynb')).read_text())
        lines = [l for c in nb['cells'] if c['cell_type']=='markdown' for l in ''.join(c['source']).splitlines()]
        assert any(l.strip('# \n')==section if section else re.match(rf'(\*\*)?{exercise}\.', l) for l in lines), p.read

# ---- right, but written otherwise

def softmax_rows(scores, dim=-1): return torch.stack([r.double().softmax(0).float() for r in scores.movedim(dim, -1).reshape(-1, scores.shape[dim])]
    ).reshape(scores.movedim(dim, -1).shape).movedim(-1, dim)

def softmax_long_way(x, dim=-1):
    z = x - torch.max(x, dim=dim, keepdim=True)[0]
    num = torch.exp(z)
    return num / torch.sum(num, dim=dim, keepdim=True)

def lse_pairs(x):
    out = x[...,0]
    for i in range(1, x.shape[-1]): out = torch.logaddexp(out, x[...,i])
    return out

def lse_where(x, dim=-1):
    m = x.amax(dim, keepdim=True)
    m = torch.where(torch.isinf(m), torch.zeros_like(m), m)
    return torch.log(torch.exp(x-m).sum(dim)) + m.squeeze(dim)

def log_softmax_in_place(x):
    y = x.clone()
    y.sub_(x.detach().amax(-1, keepdim=True))
    return y.sub_(y.exp().sum(-1, keepdim=True).log_())

def log_softmax_filled(x):
    out,rows = torch.empty_like(x),x.reshape(-1, x.shape[-1])
    for i,row in enumerate(rows): out.view(rows.shape)[i] = row-row.logsumexp(0)
    return out

def nll_loop(lp, y): return sum(-lp[i][int(c)] for i,c in enumerate(y))/len(y)
def nll_einsum(lp, y): return -torch.einsum('nc,nc->', lp, torch.eye(lp.shape[-1])[y.long()])/lp.size(0)

def cross_entropy_some_options(x, y, weight=None, reduction='mean'):
    lp,y = x-x.logsumexp(1, keepdim=True),y.long()
    w = torch.ones(x.shape[1]) if weight is None else weight
    losses = torch.stack([-lp[i,c]*w[c] for i,c in enumerate(y)])
    return losses if reduction=='none' else losses.sum()/(w[y].sum() if reduction=='mean' else 1)

def cross_entropy_kept_rows(x, y, ignore_index=-100):
    keep = y!=ignore_index
    return F.nll_loss(x[keep].log_softmax(1), y[keep].long())

def lin_numpy(x, w, b): return torch.from_numpy(x.numpy().astype('f8')@w.numpy()+b.numpy()).float()
def lin_loop(x, w, b):
    out = torch.zeros(len(x), w.shape[1])
    for i in range(len(x)):
        for j in range(w.shape[1]): out[i,j] = sum(x[i,k]*w[k,j] for k in range(len(w)))+b[j]
    return out

class ReluAlone:
    def __call__(self, x): self.x = x; self.out = x.clamp_min(0.); return self.out
    def backward(self): self.x.g = (self.x>0).float()*self.out.g

def lin_grad_einsum(inp, out, w, b):
    inp.g = torch.einsum('no,io->ni', out.g, w)
    w.g = torch.einsum('ni,no->io', inp, out.g)
    b.g = out.g.sum(dim=0)

def accuracy_loop(out, yb): return sum(int(o.argmax())==int(y) for o,y in zip(out, yb))/len(yb)

class SgdByHand:
    "Without groups or state dicts, and with the parameters in one list of pairs"
    def __init__(self, ps, lr, momentum=0, weight_decay=0, nesterov=False):
        self.lr,self.m,self.wd,self.nesterov = lr,momentum,weight_decay,nesterov
        self.pairs = [(p, torch.zeros_like(p)) for p in ps]
    def step(self):
        for p,v in self.pairs:
            if p.grad is None: continue
            g = p.grad.double() + self.wd*p.detach().double()
            v.mul_(self.m).add_(g)
            p.data.sub_(self.lr*(g+self.m*v if self.nesterov else v).float())
    def zero_grad(self):
        for p,_ in self.pairs:
            if p.grad is not None: p.grad.zero_()

class Rows:
    def __init__(self, inputs, labels): self.pairs = inputs,labels
    def __len__(self): return self.pairs[1].shape[0]
    def __getitem__(self, i): return [c[i] for c in self.pairs]

class Loader:
    def __init__(self, ds, bs, shuffle=False): self.ds,self.bs,self.shuffle = ds,bs,shuffle
    def __len__(self): return math.ceil(len(self.ds)/self.bs)
    def __iter__(self):
        todo = list(range(len(self.ds)))
        if self.shuffle: random.shuffle(todo)
        while todo:
            now,todo = todo[:self.bs],todo[self.bs:]
            xs,ys = zip(*(self.ds[i] for i in now))
            yield torch.stack(xs),torch.as_tensor(ys)

def loop_zero_first(n, net, crit, opt, batches):
    for _ in range(n):
        for x,y in batches:
            opt.zero_grad()
            crit(net(x), y).backward()
            opt.step()

def evaluate_sums(model, loss_func, dl, metrics):
    model.eval()
    with torch.inference_mode():
        rows = [[len(y)*float(f(model(x), y)) for f in (loss_func,*metrics)]+[len(y)] for x,y in dl]
    model.train()
    *sums,n = map(sum, zip(*rows))
    return tuple(s/n for s in sums)

right = [('softmax',softmax_rows), ('softmax',softmax_long_way), ('softmax',lambda x: torch.exp(x-torch.logsumexp(x, -1).unsqueeze(-1))),
    ('logsumexp',lse_pairs), ('logsumexp',lse_where), ('log_softmax',log_softmax_in_place), ('log_softmax',log_softmax_filled),
    ('log_softmax',lambda x, **kw: F.log_softmax(x, **({'dim':-1}|kw))), ('nll',nll_loop), ('nll',nll_einsum),
    ('nll',lambda lp,t: -lp.gather(1, t.long()[:,None]).mean()), ('cross_entropy',cross_entropy_some_options), ('cross_entropy',cross_entropy_kept_rows),
    ('cross_entropy',lambda logits,y: F.nll_loss(logits.log_softmax(1), y.long())), ('cross_entropy',F.cross_entropy),
    ('lin',lin_numpy), ('lin',lin_loop), ('lin',lambda x,w,b: torch.einsum('ni,io->no', x, w)+b), ('lin_grad',lin_grad_einsum),
    ('relu',lambda t: torch.where(t>0, t, torch.zeros(()))), ('relu',lambda x: (x+x.abs())/2), ('relu',lambda x: torch.from_numpy(np.maximum(x.numpy(), 0))),
    ('mse',lambda a,b: ((a-b.reshape(a.shape))**2).sum()/a.numel()), ('mse',lambda o,y: float(((o.reshape(y.shape)-y)**2).mean())), ('Relu',ReluAlone),
    ('accuracy',accuracy_loop), ('SGD',SgdByHand), ('Optimizer',SgdByHand), ('Dataset',Rows), ('DataLoader',Loader), ('loop',loop_zero_first),
    ('evaluate',evaluate_sums), ('SequentialModel',lambda ls: nn.Sequential(*ls)), ('collate',torch.utils.data.default_collate),
    ('mlp',lambda i,h,o: nn.Sequential(nn.Linear(i,h), nn.Threshold(0,0), nn.Linear(h,o)))]

@pytest.mark.parametrize('name,f', right, ids=[f'{n}-{f.__name__}' for n,f in right])
def test_right_versions_written_otherwise(name, f): pieces[name](f)

# ---- wrong, as beginners write it

def ce_weights(x, y, weight=None):
    losses = -x.log_softmax(1)[range(len(y)),y.long()]
    return losses.mean() if weight is None else (losses*weight[y.long()]).mean()

def ce_smoothed(x, y, label_smoothing=0.):
    t = torch.full_like(x, label_smoothing/(x.shape[1]-1))
    t[range(len(y)),y.long()] = 1-label_smoothing
    return -(t*x.log_softmax(1)).sum(1).mean()

def ce_ignored(x, y, ignore_index=-100):
    keep = y!=ignore_index
    return -(x.log_softmax(1).gather(1, y.long().clamp(min=0)[:,None])[:,0]*keep).mean()

def ce_reads_ignored(x, y, ignore_index=-100): return -x.log_softmax(1)[torch.arange(len(y)),y.long()].mean()
def ce_one_reduction(x, y, reduction='mean'): return -x.log_softmax(1)[range(len(y)),y.long()].mean()

def softmax_twice_lost(x):
    x = x - x.max(-1).values
    return x.exp()/x.exp().sum(-1)

@torch.no_grad()
def log_softmax_no_grad(x): return x.log_softmax(-1)

def log_softmax_numpy(x):
    a = x.numpy().astype('f8')
    a = a-a.max(-1, keepdims=True)
    return torch.from_numpy((a-np.log(np.exp(a).sum(-1, keepdims=True))).astype('f4'))

def nll_items(lp, y):
    loss = 0
    for i,c in enumerate(y.tolist()): loss -= lp[i,c].item()
    return loss/len(y)

def lin_grad_returned(inp, out, w, b): return out.g@w.t(),inp.t()@out.g,out.g.sum(0)

class ReluInPlace(ReluAlone):
    def __call__(self, x): self.x = x; self.out = x.clamp_(min=0); return self.out

@pytest.mark.parametrize('name,f,says', [
    ('softmax', softmax_twice_lost, 'both lost their dimension'), ('softmax', lambda x: x.softmax(1), 'the last one of a matrix only'),
    ('softmax', lambda x: math.exp(x)/sum(math.exp(x)), '`math` knows single numbers only'), ('softmax', lambda x: (x-x.max(-1, keepdim=True)).exp(), 'gives a pair'),
    ('logsumexp', lambda x: (x-x.max(-1, keepdim=True)[0]).exp().sum(-1).log()+x.max(-1, keepdim=True)[0], 'both with `keepdim`'),
    ('log_softmax', lambda x: torch.log(torch.exp(x)/torch.exp(x).sum(-1, keepdim=True)), '`exp` overflows'),
    ('log_softmax', log_softmax_no_grad, 'cut off from autograd'), ('log_softmax', log_softmax_numpy, 'computed by numpy'),
    ('nll', nll_items, 'cut off from autograd'), ('cross_entropy', lambda x,y: F.cross_entropy(x, y.long()).item(), 'cut off from autograd'),
    ('nll', lambda lp,y: -lp.gather(1, y).mean(), 'the column that `gather` wants'), ('nll', lambda lp,y: -lp.gather(1, y[:,None]).mean(), '`target = target.long()`'),
    ('cross_entropy', lambda x,y: -(F.one_hot(y, x.shape[1])*x.log_softmax(1)).sum(1).mean(), '`target = target.long()`'),
    ('nll', lambda lp,y: -lp[range(len(y)),y.long()], 'one loss for each row still'), ('nll', lambda lp,y: -lp[y.long()].mean(), 'the targets pick rows'),
    ('cross_entropy', ce_weights, 'by the sum of their weights'), ('cross_entropy', ce_smoothed, '`eps/(C-1)`'), ('cross_entropy', ce_ignored, 'ignored rows count'),
    ('cross_entropy', ce_reads_ignored, '`ignore_index` is taken, but not used'), ('cross_entropy', ce_one_reduction, '`reduction` is taken, but not used'),
    ('relu', lambda x: max(x, 0), "Python's own `max`"), ('relu', lambda x: x if x>0 else 0, "Python's own `max`"), ('relu', lambda x: torch.max(x, 0), 'largest along dim 0'),
    ('mse', lambda o,y: (o.squeeze(-1)-y**2).mean(), '`**` goes before `-`'), ('lin_grad', lin_grad_returned, 'nothing is stored'),
    ('Relu', ReluInPlace, 'the input itself is changed')])
def test_what_beginners_write_is_named(name, f, says):
    text = message(pieces[name], f)
    assert says in text and 'looks like' not in text

def test_a_wrong_gradient_under_right_values():
    def log_softmax(x): return x - x.logsumexp(-1, keepdim=True).detach()
    text = message(check.log_softmax, log_softmax)
    assert 'yours: gradient of x' in text and 'The values are right, but not the gradient' in text

def test_the_case_shown_is_the_one_that_was_run():
    def softmax(x): return x.softmax(-1) if x.numel()!=40 else x
    rows = dict(l.strip().split(None, 1) for l in message(check.softmax, softmax).splitlines()[1:3])
    assert rows['x']==rows['yours'] and 'shape (4, 10)' in rows['x']

# ---- half finished

@pytest.mark.parametrize('f,says', [
    (lambda x: None, 'Nothing came back: does it end with `return`?'),
    (lambda x: x.log_softmax(-1).tolist(), 'What came back is a list, where a Tensor is right'),
    (lambda x: x.detach().log_softmax(-1).numpy(), 'What came back is an ndarray, where a Tensor is right'),
    (lambda x: x.log_softmax(-1).double(), 'The dtype is torch.float64, where torch.float32 is right'),
    (lambda x: x.log_softmax(-1)[None], r'The shape is (1, 1, 3), where (1, 3) is right'),
    (lambda: 0, 'It is called as `log_softmax(x)`'), (lambda x, y: x, 'It is called as `log_softmax(x)`'), (3, 'It is called as')])
def test_half_finished(f, says):
    text = message(check.log_softmax, f)
    assert says in text and 'This is what comes out' not in text and 'looks like' not in text

def test_not_begun():
    def softmax(x): raise NotImplementedError('your turn')
    assert message(check.softmax, softmax)=='softmax is still to be written: your turn'

def test_an_exception_is_shown_with_its_line_and_the_shapes():
    def softmax(x):
        e = x.exp()
        return e/e.sum(-1).view(7)     # here
    text = message(check.softmax, softmax)
    assert "RuntimeError: shape '[7]' is invalid" in text and 'in the line `return e/e.sum(-1).view(7)     # here`' in text and 'shape (1, 3)' in text

def test_two_mistakes_at_once_are_a_guess():
    text = message(check.log_softmax, lambda x: x.log_softmax(0) if x.ndim<3 else x)
    assert 'It looks like what comes out when' in text
    assert 'comes out when' not in message(check.mse, lambda o,t: o.new_tensor(17.25))

def test_options_that_are_ignored_are_not_taken_for_another_mistake():
    def lost(x, y, weight=None, ignore_index=-100, reduction='mean', label_smoothing=0.):
        return F.cross_entropy(x, y.long(), weight, ignore_index=ignore_index, label_smoothing=label_smoothing/2)
    assert 'too small for a float' not in message(check.cross_entropy, lost)
    def inner(x): raise NotImplementedError('not implemented for Long')
    assert 'still to be written' not in message(check.softmax, inner)
    assert 'The shape is ()' in message(check.softmax, lambda x: x.sum())

def test_options_that_a_version_does_not_take_are_left_out(capsys):
    check.softmax(lambda x: x.softmax(-1))
    assert capsys.readouterr().out=='softmax: right, in 9 cases\n'

def test_nothing_global_changes():
    torch.manual_seed(3); np.random.seed(4); random.seed(5)
    want = torch.rand(3),np.random.rand(3),random.random()
    torch.manual_seed(3); np.random.seed(4); random.seed(5)
    with torch.no_grad():
        check.loop(loop_zero_first); check.DataLoader(Loader)
        message(check.SGD, SgdByHand.__mro__[-1])
        assert not torch.is_grad_enabled()
    got = torch.rand(3),np.random.rand(3),random.random()
    assert got[0].equal(want[0]) and (got[1]==want[1]).all() and got[2]==want[2]

def test_an_argument_that_is_changed_is_seen():
    def log_softmax(x): x -= x.logsumexp(-1, keepdim=True); return x
    assert 'x after the call' in message(check.log_softmax, log_softmax)

# ---- files

def minibatch(*argv, cwd=None):
    return subprocess.run([sys.executable, '-m', 'minibatch', *map(str, argv)], capture_output=True, text=True, cwd=cwd, env={**os.environ, 'PYTHONPATH':str(ROOT)})

def written(tmp_path, text, name='mine.py'):
    (tmp_path/name).write_text(text)
    return tmp_path/name

SECOND = [k for k,p in pieces.items() if p.read.startswith('lesson 2, ex')]
SOFTMAX = 'import torch\ndef softmax(x): return (x-x.amax(-1, keepdim=True)).exp()/(x-x.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)\n'
WRONG = 'def relu(x): return x.abs()\n'

def test_a_file_that_is_right_prints_a_lot_and_exits(tmp_path):
    f = written(tmp_path, SOFTMAX + 'import sys\nfor _ in range(10**5): print("x"*100)\nfrom torch.nn.functional import relu\nsys.exit(3)\n')
    p = minibatch('check', f)
    assert (p.returncode,p.stderr)==(0,'')
    lines = dict(l.split(None, 1) for l in p.stdout.splitlines())
    assert lines['softmax']=='right, in 9 cases' and lines['not']=='there: logsumexp, log_softmax, nll, cross_entropy, '+', '.join(SECOND) and 'relu' not in lines      # that one is PyTorch's
    assert len(p.stdout)<2000

def test_wrong_and_json(tmp_path):
    f = written(tmp_path, SOFTMAX+WRONG+'class SGD:\n    def __init__(self, *args, **kw): raise NotImplementedError\n')
    p = minibatch('check', f)
    assert p.returncode==1 and p.stdout.count('Read lesson')==1 and '`x.clamp(min=0)`' in p.stdout
    p = minibatch('check', f, '--json')
    res = json.loads(p.stdout)
    assert p.returncode==1 and {k:r['status'] for k,r in res['names'].items()}==dict(softmax='right', relu='wrong', SGD='not there')

def test_others_than_the_first_in_a_line_each(tmp_path):
    f = written(tmp_path, SOFTMAX+WRONG+'def mse(o, t): return (o-t).pow(2).mean()\ndef nll(x, y): return -x[range(len(y)),y.long()].sum()\nlog_softmax = lambda x: 7\n')
    out = minibatch('check', f).stdout
    assert out.count('The smallest of them')==1 and out.index('not there: ') < out.index('relu is wrong in') < out.index('\nmse: This is what comes out when (n,1) minus (n,)')
    assert '\nnll: This is what comes out when the losses are added up: `mean()`, not `sum()`.\nlog_softmax:' not in out and 'nll: This is' in out
    assert re.search(r'\nlog_softmax: What came back is a number, where a Tensor is right\.\n', out)

def test_a_notebook_and_its_errors(tmp_path):
    def cell(src): return dict(cell_type='code', source=[src], metadata={}, outputs=[], execution_count=None)
    nb = dict(cells=[dict(cell_type='markdown', source=['# Hi'], metadata={}), cell('%matplotlib inline\n!ls\nimport torch'), cell('1/0'), cell(WRONG)], metadata={}, nbformat=4, nbformat_minor=5)
    p = minibatch('check', written(tmp_path, json.dumps(nb), 'mine.ipynb'))
    assert p.returncode==1 and 'It stopped early: mine.ipynb, cell 2: ZeroDivisionError' in p.stdout and 'relu  wrong\n' in p.stdout

@pytest.mark.parametrize('text,says', [('def f(:', 'no Python file or notebook that can be read'), ('x = 1', 'nothing in it has a name'),
    ('import os\nos._exit(0)', 'did not come to its end (exit status 0)'), ('import os\nos.kill(os.getpid(), 9)', 'did not come to its end')])
def test_what_cannot_be_checked(tmp_path, text, says):
    p = minibatch('check', written(tmp_path, text))
    assert p.returncode==2 and says in p.stderr and p.stderr.count('\n')==1 and not p.stdout

def test_no_file_and_no_notebook(tmp_path):
    assert minibatch('check', tmp_path/'none.py').returncode==2
    p = minibatch('check', written(tmp_path, '{"cells": 3}', 'bad.ipynb'))
    assert p.returncode==2 and 'can be read' in p.stderr

def test_what_hangs_is_ended(tmp_path):
    f = written(tmp_path, 'import time\nwhile True: time.sleep(0.1)')
    p = minibatch('check', f, '--timeout', 5)
    assert p.returncode==2 and 'did not come to its end within 5 s' in p.stderr
    f = written(tmp_path, SOFTMAX+'import time\ndef relu(x):\n    while True: time.sleep(0.1)\n')
    p = minibatch('check', f, '--timeout', 20)
    assert p.returncode==1 and 'relu did not come to an end' in p.stdout

# ---- lessons with holes

@pytest.fixture(scope='module')
def holes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('mine')
    assert minibatch('exercises', folder).returncode==0
    return {p.name:json.loads(p.read_text()) for p in folder.iterdir()},folder

@pytest.fixture(scope='module')
def solved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    assert minibatch('exercises', folder, '--nbgrader').returncode==0
    return folder

def code(nb): return [c['source'] for c in nb['cells'] if c['cell_type']=='code']

def test_bodies_are_gone_and_checks_stand(holes):
    nbs,_ = holes
    assert len(nbs)==8
    text = '\n'.join(s for nb in nbs.values() for s in code(nb))
    assert 'torch.addmm(b, x, w)' not in text and "y.exp().sum(dim, keepdim=True).log()" not in text and 'SOLUTION' not in text
    assert '"Log of `softmax(x)`, exact also' in text and 'dim:int=-1 # the dimension that holds the classes' in text and '#| export' not in text
    for name in ('softmax','log_softmax','Lin','SGD','DataLoader','fit'): assert text.count(f'check.{name}({name})')==1
    for s in code(nbs['02_losses.ipynb']): compile(s, 'cell', 'exec')
    assert not any('nbgrader' in c['metadata'] for nb in nbs.values() for c in nb['cells'])
    pictures = sum('image/png' in o.get('data', {}) for nb in nbs.values() for c in nb['cells'] for o in c.get('outputs', []))
    assert pictures>20

def test_work_is_not_overwritten(holes):
    p = minibatch('exercises', holes[1])
    assert p.returncode==2 and 'is there already' in p.stderr

def test_what_is_still_to_be_written_says_so(holes):
    ns = {}
    for s in code(holes[0]['02_losses.ipynb']):
        if s.startswith(('import torch\n','from minibatch import check','def softmax(')): exec(s, ns)
    with pytest.raises(Wrong, match='softmax is still to be written: your turn'): exec('check.softmax(softmax)', ns)

def test_every_check_cell_fails_with_every_mistake_in_place(holes):
    cells = [s for nb in holes[0].values() for s in code(nb) if re.fullmatch(r'check\.(\w+)\(\1\)', s)]
    assert len(cells)>=30
    for s in cells:
        name = s.split('(')[0][6:]
        for f,_ in pieces[name].mistakes:
            with pytest.raises(Wrong): exec(s, {'check':check, name:f})

@pytest.mark.parametrize('name', [p.name for p in sorted((ROOT/'nbs').glob('0[0-7]_*.ipynb'))])
def test_with_the_bodies_put_back_it_runs(solved, name, bare):
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    shell = CaptureShell(path=solved)
    for c in read_nb(solved/name).cells:
        if c.cell_type!='code': continue
        shell.run(c.source)
        assert not shell.exc, (c.source, shell.exc)

def test_nbgrader_takes_the_lessons(solved, tmp_path):
    pytest.importorskip('nbgrader')
    src = tmp_path/'source'/'lessons'
    src.mkdir(parents=True)
    for p in solved.iterdir(): (src/p.name).write_bytes(p.read_bytes())
    p = subprocess.run([sys.executable, '-m', 'nbgrader', 'generate_assignment', 'lessons', '--create'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    text = (tmp_path/'release'/'lessons'/'02_losses.ipynb').read_text()
    assert 'YOUR CODE HERE' in text and 'SOLUTION' not in text and 'y.exp().sum(dim, keepdim=True).log()' not in text

@pytest.mark.parametrize('page', ['README.md', 'docs/index.md'])
def test_the_first_screen_shows_what_check_says(page):
    text = (ROOT/page).read_text()
    code = next(c for c in re.findall(r'```python\n(.*?)```', text, re.S) if 'check.log_softmax' in c)
    names = {}
    exec(re.search(r'def log_softmax.*?\n(?=\S)', code.replace('\n\n', '\n'), re.S)[0], dict(torch=torch), names)
    assert ' '.join(message(check.log_softmax, names['log_softmax']).split()) in ' '.join(text.split())
