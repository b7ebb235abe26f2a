"accuracy, confusion and report: against counting in Python, in every integer width, and with what goes wrong"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from minibatch.metrics import accuracy, confusion, report

INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

def brute(out, yb): # first largest score of each row, in Python; nan anywhere in a row makes it wrong
    rows,labels = out.double().reshape(-1, out.shape[-1]).tolist(),yb.tolist() if yb.ndim==1 else yb.flatten().tolist()
    hits = [not any(map(math.isnan, r)) and r.index(max(r))==y for r,y in zip(rows, labels, strict=True)]
    return sum(hits)/len(hits)

@settings(deadline=None, max_examples=200)
@given(n=st.integers(1,40), c=st.integers(2,12), seed=st.integers(0,2**32-1), odd=st.floats(0,0.3), ydtype=st.sampled_from(INTS), dtype=st.sampled_from(FLOATS))
def test_like_counting(n, c, seed, odd, ydtype, dtype):
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(n, c, generator=g).to(dtype)
    for special in (math.nan, math.inf, -math.inf): out[torch.rand(n, c, generator=g)<odd/3] = special
    yb = torch.randint(0, c, (n,), generator=g)
    a = accuracy(out, yb.to(ydtype))
    assert a.shape==() and a.dtype==torch.float32 and not a.requires_grad
    assert a.item()==pytest.approx(brute(out, yb), abs=1e-6)

@pytest.mark.parametrize('shape', [(5,1), (5,0)])
def test_one_score_is_no_choice(shape):
    with pytest.raises(ValueError, match='at least 2 classes'): accuracy(torch.zeros(shape), torch.zeros(5, dtype=torch.int64))

def test_like_pytorch():
    out,yb = torch.randn(1000,10,dtype=torch.float64),torch.randint(0,10,(1000,))
    assert accuracy(out, yb)==(F.log_softmax(out, -1).argmax(-1)==yb).float().mean()
    assert accuracy(out.requires_grad_(), yb).requires_grad is False
    assert accuracy(torch.randint(0,9,(5,3)), torch.zeros(5, dtype=torch.int64)).shape==()

@pytest.mark.parametrize('shape', [(10,), (4,10), (4,10,7), (2,10,3,5)])
@pytest.mark.parametrize('dtype', INTS)
def test_classes_are_where_cross_entropy_has_them(shape, dtype):
    dim = int(len(shape)>1)
    out,yb = torch.randn(shape),torch.randint(0, 10, shape[:dim]+shape[dim+1:])
    guess = out.argmax(dim)
    yb = torch.where(torch.rand(yb.shape)<.5, guess, yb)
    F.cross_entropy(out, yb)                # the same shapes fit there
    assert accuracy(out, yb.to(dtype)).item()==pytest.approx(brute(out.movedim(dim, -1), yb), abs=1e-6)
    assert accuracy(out, guess.to(dtype))==1

def test_empty_batch_is_nan():
    a = accuracy(torch.zeros(0,10), torch.zeros(0, dtype=torch.int64))
    assert a.isnan() and a.shape==() and F.cross_entropy(torch.zeros(0,10), torch.zeros(0, dtype=torch.int64)).isnan()

def test_a_blown_up_net_gets_nothing():
    out,yb = torch.full((50,10), math.nan),torch.zeros(50, dtype=torch.int64)
    assert (out.argmax(-1)==yb).all() and accuracy(out, yb)==0
    out[0] = torch.tensor([math.inf]+[-math.inf]*9)
    assert accuracy(out, yb).item()==pytest.approx(1/50)

@pytest.mark.parametrize('yshape,fix', [((63,),''), ((65,),''), ((64,1),'use target.squeeze(1)'), ((1,64),'use target.squeeze(0)'), ((64,10),'use target.argmax(1)'), ((1,),''), ((),'')])
def test_shapes_that_do_not_agree(yshape, fix):
    with pytest.raises(ValueError) as e: accuracy(torch.zeros(64,10), torch.zeros(yshape, dtype=torch.int64))
    for part in ('(64, 10)', '(64,)', f'target has shape {yshape}', fix): assert part in str(e.value)
    assert bool(fix)==('use' in str(e.value))

def test_words_with_the_classes_last():
    with pytest.raises(ValueError, match=r'use input.transpose\(1,2\)$'): accuracy(torch.zeros(4,7,11), torch.zeros(4,7).long())

@pytest.mark.parametrize('dtype', FLOATS)
def test_floating_labels(dtype):
    with pytest.raises(ValueError, match=f'{dtype}.*target.long'): accuracy(torch.zeros(8,10), torch.full((8,), 2., dtype=dtype))

@pytest.mark.parametrize('loss', [0.25, torch.tensor(0.25), torch.tensor(0.25, requires_grad=True), torch.tensor(0.25, dtype=torch.bfloat16)])
def test_report(loss, capsys, recwarn):
    assert report(loss, torch.eye(4), torch.tensor([0,1,2,0])) is None
    assert capsys.readouterr().out=='loss 0.250, accuracy 0.750\n' and not recwarn.list

def test_report_wants_one_loss(capsys):
    with pytest.raises(RuntimeError, match='4 elements'): report(torch.ones(4), torch.eye(4), torch.arange(4))
    with pytest.raises(ValueError, match='one class per row'): report(1., torch.eye(4), torch.arange(3))
    report(math.nan, torch.eye(4), torch.arange(4))
    assert capsys.readouterr().out=='loss nan, accuracy 1.000\n'

@settings(deadline=None)
@given(n=st.integers(0,40), c=st.integers(2,12), seed=st.integers(0,2**32-1), ydtype=st.sampled_from(INTS), dtype=st.sampled_from(FLOATS))
def test_confusion_is_scikit_learns(n, c, seed, ydtype, dtype):
    from sklearn.metrics import confusion_matrix
    g = torch.Generator().manual_seed(seed)
    out,yb = torch.randn(n, c, generator=g).to(dtype),torch.randint(0, c, (n,), generator=g)
    table = confusion(out, yb.to(ydtype))
    want = confusion_matrix(yb, out.argmax(1), labels=range(c)) if n else torch.zeros(c, c)
    assert table.dtype==torch.int64 and table.equal(torch.as_tensor(want).long())

def test_confusion_of_pixels_and_of_what_cannot_be_counted():
    out,yb = torch.randn(2,4,5,3),torch.randint(0,4,(2,5,3))
    assert confusion(out, yb).equal(confusion(out.movedim(1,-1).reshape(-1,4), yb.flatten()))
    for bad in (-100, 4):
        with pytest.raises(ValueError, match=f'labels should be 0 to 3; got .*{bad}'): confusion(out, torch.where(yb==yb.max(), bad, yb))
    with pytest.raises(ValueError, match='nan among'): confusion(out*math.nan, yb)
    with pytest.raises(ValueError, match='target has shape'): confusion(out, yb[:1])
