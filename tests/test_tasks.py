"Eight everyday tasks, each as short as a user would write it; each ends better than a baseline, with the figures of one batch of everything"
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from sklearn.metrics import f1_score, roc_auc_score
from minibatch.data import Dataset, DataLoader, get_dls
from minibatch.datasets import get_data
from minibatch.losses import cross_entropy
from minibatch.metrics import accuracy
from minibatch.optim import SGD
from minibatch.training import *

quiet = dict(progress=False)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

@pytest.fixture(scope='module')
def digits(): return get_data('digits')

def test_regression():
    x,w = torch.randn(700,5),torch.randn(5)
    y = x@w+0.1*torch.randn(700)
    train_dl,valid_dl = get_dls(Dataset(x[:600],y[:600]), Dataset(x[600:],y[600:]), bs=32)
    net = nn.Sequential(nn.Linear(5,1), nn.Flatten(0))
    loss, = fit(5, net, F.mse_loss, SGD(net.parameters(), lr=0.05), train_dl, valid_dl, metrics=(), **quiet)
    assert loss==pytest.approx(F.mse_loss(net(x[600:]), y[600:]).item(), rel=1e-5)
    assert loss<0.02 and y[600:].var()>1                   # the noise has 0.01

def test_pixel_classes():
    x = torch.randn(90,1,8,8)
    y = (F.avg_pool2d(x, 3, 1, 1)>0).long()[:,0]
    train_dl,valid_dl = get_dls(Dataset(x[:70],y[:70]), Dataset(x[70:],y[70:]), bs=7)
    net = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,2,1))
    loss,acc = fit(20, net, F.cross_entropy, SGD(net.parameters(), 0.1, 0.9), train_dl, valid_dl, **quiet)
    with torch.no_grad(): preds = net(x[70:])
    assert loss==pytest.approx(F.cross_entropy(preds, y[70:]).item(), rel=1e-5)
    assert acc==pytest.approx((preds.argmax(1)==y[70:]).float().mean().item(), rel=1e-5) and acc>0.9

def test_padded_text():
    "Which token stood before? The lengths differ, so that nothing is a mean over rows"
    texts = [torch.randint(1, 9, (n,)) for n in torch.randint(2, 30, (200,)).tolist()]
    pairs = [(t,t.roll(1)) for t in texts]
    def padded(pairs):
        x,y = zip(*pairs)
        return pad_sequence(x, batch_first=True),pad_sequence(y, batch_first=True, padding_value=-100)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.rnn,self.out = nn.Embedding(9,16),nn.GRU(16,32,batch_first=True),nn.Linear(32,9)
        def forward(self, x): return self.out(self.rnn(self.emb(x))[0]).transpose(1,2)
    def tokens(yb): return (yb!=-100).sum()
    net = Net()
    train_dl,valid_dl = (DataLoader(p, bs, collate_fn=padded) for p,bs in ((pairs[:150],16),(pairs[150:],7)))
    loss, = fit(6, net, F.cross_entropy, torch.optim.Adam(net.parameters(), 0.02), train_dl, valid_dl, metrics=(), count=tokens, **quiet)
    x,y = padded(pairs[150:])
    assert loss==pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-4)
    by_rows, = evaluate(net, F.cross_entropy, valid_dl, ())
    assert abs(by_rows-loss)>1e-3*loss and loss<0.5<F.cross_entropy(torch.zeros(1,9), y[:1,0])     # log(9) by guessing

def test_autoencoder(digits):
    x,_,xv,_ = digits
    train_dl,valid_dl = get_dls(Dataset(x,x), Dataset(xv,xv), bs=64)
    net = nn.Sequential(nn.Linear(784,32), nn.ReLU(), nn.Linear(32,784))
    loss, = fit(15, net, F.mse_loss, torch.optim.Adam(net.parameters(), 3e-3), train_dl, valid_dl, metrics=(), **quiet)
    assert loss==pytest.approx(F.mse_loss(net(xv), xv).item(), rel=1e-5)
    assert loss<0.7*F.mse_loss(x.mean(0).expand_as(xv), xv).item()         # better than the mean image
    assert predict(net, valid_dl).shape==xv.shape

def test_siamese():
    "Same class or not? In the batch, the right image comes first"
    centres = 2*torch.randn(5,10)
    def pairs(n):
        a,same = torch.randint(5, (n,)),torch.rand(n)<0.5
        b = torch.where(same, a, (a+torch.randint(1, 5, (n,)))%5)
        l,r = (centres[i]+torch.randn(n,10) for i in (a,b))
        return [dict(right=r[i], left=l[i], same=same[i].float()) for i in range(n)]
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.seen = nn.Linear(10,8),[]
        def forward(self, left, right):
            self.seen.append(left)
            return 4-(self.body(left)-self.body(right)).pow(2).sum(1)
    def hits(preds, yb): return ((preds>0)==yb.bool()).float().mean()
    valid = pairs(100)
    net,train_dl,valid_dl = Siamese(),DataLoader(pairs(1000), 50, shuffle=True),DataLoader(valid, 30)
    loss,acc = fit(10, net, F.binary_cross_entropy_with_logits, SGD(net.parameters(), 0.02, 0.9), train_dl, valid_dl, hits, **quiet)
    left,right,same = (torch.stack([v[k] for v in valid]) for k in ('left','right','same'))
    net.seen.clear(); evaluate(net, F.binary_cross_entropy_with_logits, valid_dl, ())
    assert torch.equal(torch.cat(net.seen), left)                           # not swapped
    preds = net(left, right)
    assert loss==pytest.approx(F.binary_cross_entropy_with_logits(preds, same).item(), rel=1e-5)
    assert acc==pytest.approx(hits(preds, same).item()) and acc>0.8

def test_class_weights_and_label_smoothing():
    x = torch.randn(800,4)
    y = (x[:,0]+0.5*torch.randn(800)>1.3).long()                            # a tenth of them
    w = torch.tensor([1.,9.])
    def loss_func(preds, yb): return cross_entropy(preds, yb, weight=w, label_smoothing=0.1)
    def recall(preds, yb): return (preds.argmax(1)==1)[yb==1].float().mean()
    nets,res = [nn.Linear(4,2),nn.Linear(4,2)],[]
    for net,f,count in (nets[0],loss_func,lambda yb: w[yb].sum()),(nets[1],F.cross_entropy,len):
        train_dl,valid_dl = get_dls(Dataset(x[:600],y[:600]), Dataset(x[600:],y[600:]), bs=16)
        res.append(fit(5, net, f, SGD(net.parameters(), 0.1), train_dl, valid_dl, [whole(recall),whole(accuracy)], count=count, **quiet))
    preds,yv = nets[0](x[600:]),y[600:]
    assert res[0]==pytest.approx((F.cross_entropy(preds, yv, weight=w, label_smoothing=0.1).item(), recall(preds, yv).item(), (preds.argmax(1)==yv).float().mean().item()), rel=1e-5)
    assert res[0][1]>res[1][1]+0.1                                          # the rare class is found more often

def test_frozen_body():
    x,y = torch.randn(300,6)+3,torch.randint(0,3,(300,))
    x[:,0] += 4*y
    body = nn.Sequential(nn.Linear(6,32), nn.BatchNorm1d(32), nn.ReLU())
    with torch.no_grad(): [body(x) for _ in range(50)]                      # as if trained before
    body.eval().requires_grad_(False)
    net = nn.Sequential(body, nn.Linear(32,16), nn.ReLU(), nn.Linear(16,3))
    opt = torch.optim.SGD([dict(params=net[1].parameters(), lr=0.01), dict(params=net[3].parameters(), lr=0.1)], momentum=0.9)
    was = {k:v.clone() for k,v in body.state_dict().items()}
    train_dl,valid_dl = get_dls(Dataset(x[:200],y[:200]), Dataset(x[200:],y[200:]), bs=20)
    loss,acc = fit(10, net, cross_entropy, opt, train_dl, valid_dl, **quiet)
    assert all(torch.equal(v, was[k]) for k,v in body.state_dict().items())
    assert net.training and not any(m.training for m in body.modules())
    net.eval()
    assert loss==pytest.approx(F.cross_entropy(net(x[200:]), y[200:]).item(), rel=1e-5) and acc>0.8

def test_f1_and_auc():
    x = torch.randn(500,4)
    y = (x[:,0]+torch.randn(500)>1).long()
    def f1(preds, yb): return f1_score(yb, preds.argmax(1))
    def auc(preds, yb): return roc_auc_score(yb, preds.softmax(1)[:,1])
    order = y[300:].argsort()
    xv,yv = x[300:][order],y[300:][order]                    # batches of one class, of which nobody knows an AUC
    train_dl,valid_dl = DataLoader(Dataset(x[:300],y[:300]), 10, shuffle=True),DataLoader(Dataset(xv,yv), 16)
    net,h = nn.Linear(4,2),History()
    _,acc,f,a = fit(3, net, F.cross_entropy, SGD(net.parameters(), 0.1), train_dl, valid_dl, (accuracy,whole(f1),whole(auc)), cbs=h, **quiet)
    out = net(xv).detach()
    assert (acc,f,a)==pytest.approx((accuracy(out, yv).item(), f1_score(yv, out.argmax(1)), roc_auc_score(yv, out[:,1]-out[:,0])), abs=1e-5)
    assert a>0.7 and h.rows[-1]['f1']==f and type(f) is type(a) is float
