"The page of a run: what it says, and its net in a browser, drawn for by mouse and by finger"
import base64, json, math, re, shutil, zlib
from copy import deepcopy
from pathlib import Path
import pytest, torch
from torch import nn
from minibatch.all import *
from minibatch.cli import main, report_html, wilson, Times

BOX = {'0': [[(.5,.15), (.34,.24), (.28,.5), (.34,.76), (.5,.85), (.66,.76), (.72,.5), (.66,.24), (.5,.15)]],
       '1': [[(.52,.15), (.5,.85)]],
       '7': [[(.28,.18), (.7,.17), (.46,.85)]]}

def small_run(name='digits', model='mlp', epochs=12, n=None):
    "`report_html`'s arguments after a short training"
    torch.manual_seed(3)
    x,y,xv,yv = get_data(name)
    data = xt,yt,x,y = x[:n],y[:n],xv[:n],yv[:n]
    net = cnn(10) if model=='cnn' else mlp(784, 50, 10)
    train_dl,valid_dl = get_dls(Dataset(xt, yt), Dataset(x, y), 64)
    history,times = History(),Times()
    fit(epochs, net, cross_entropy, SGD(net.parameters(), lr=0.05, momentum=0.9), train_dl, valid_dl, cbs=[history, times], progress=False)
    return dict(model=net, preds=predict(net, valid_dl), data=data, history=history, classes=dataset_classes(name), settings=dict(dataset=name, model=model), times=times.seconds)

@pytest.fixture(scope='module')
def digits(): return small_run()

@pytest.fixture(scope='module')
def digits_cnn(): return small_run(model='cnn', epochs=4)

def read(page): return json.loads(re.search('<script type="application/json" id="run">(.*)</script>', page)[1])
def unpack(p):
    raw = bytearray(zlib.decompress(base64.b64decode(p['data'])))
    return torch.frombuffer(raw, dtype=getattr(torch, p['dtype'])).view(p['shape'])

# ---------------------------------------------------------------- without a browser
def test_wilson_is_scipys():
    from scipy.stats import binomtest
    for k,n in ((0,10), (3,10), (10,10), (9650,10000), (1,1)):
        want = binomtest(k, n).proportion_ci(method='wilson')
        assert wilson(k, n, z=1.959963984540054)==pytest.approx((want.low, want.high), abs=1e-9)

def test_what_the_page_holds(digits):
    page = report_html(**digits)
    run,(xt,yt,x,y),preds = read(page),digits['data'],digits['preds']
    assert len(page)<3e6 and 'http' not in page
    assert run['confusion']==confusion(preds, y).tolist()
    assert run['accuracy']['right']==(preds.argmax(1)==y).sum() and run['accuracy']['n']==297
    for name,p in digits['model'].named_parameters():
        i,k = name.split('.')
        assert unpack(run['layers'][int(i)][k]).equal(p.detach())
    shown = run['shown']
    labels,guess = torch.tensor(shown['y']),torch.tensor(shown['guess'])
    cells = torch.zeros(10, 10, dtype=torch.long)
    for i,j in zip(labels, guess): cells[i,j] += 1
    assert cells.equal(confusion(preds, y).clamp(max=24))           # all of a small cell, 24 of a large one
    pixels = unpack(shown['x']).float()/255
    for im,l,g,s in zip(pixels, labels, guess, shown['sure']):      # each image with what is said of it
        i = (x-im).abs().amax(1).argmin()
        assert (x[i]-im).abs().max()<0.003 and y[i]==l and preds[i].argmax()==g and preds[i].softmax(0).max().item()==pytest.approx(s, abs=1e-5)
    wrong = [s for s,l,g in zip(shown['sure'], labels, guess) if l!=g]
    assert wrong==sorted(wrong, reverse=True) and max(wrong)==pytest.approx(preds.softmax(1).amax(1)[preds.argmax(1)!=y].max().item())
    assert len(run['train_y'])==1000 and torch.tensor(run['train_y']).bincount().tolist()==[100]*10

def test_many_weights_become_float16_only_if_no_prediction_changes(digits_cnn):
    run = read(report_html(**digits_cnn))
    assert {l['weight']['dtype'] for l in run['layers'] if 'weight' in l}=={'float16'} and 'of the 297 predictions that are nearest to another class none changes' in run['weights']
    other = digits_cnn | dict(preds=digits_cnn['preds'].roll(1, 1))     # predictions that rounded weights cannot give
    run = read(report_html(**other))
    assert {l['weight']['dtype'] for l in run['layers'] if 'weight' in l}=={'float32'}

@pytest.mark.parametrize('layer', [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 3, stride=2), nn.Conv2d(1, 8, (3,5)), nn.Conv2d(1, 8, 3, bias=False), nn.Linear(784, 10, bias=False),
                                   nn.MaxPool2d(3), nn.MaxPool2d(2, 1), nn.Tanh(), nn.BatchNorm1d(784)], ids=str)
def test_a_layer_that_the_page_cannot_compute_is_refused(digits, layer):
    with pytest.raises(ValueError, match='the page can compute layers as in mlp and cnn; got '+type(layer).__name__): report_html(**(digits | dict(model=nn.Sequential(layer))))

def test_names_cannot_break_the_page(digits):
    classes = ['</script><b>', *'123456789']
    page = report_html(**(digits | dict(classes=classes)))
    assert '</script><b>' not in page and read(page)['classes']==classes

def test_figures_that_are_no_numbers_do_not_lose_the_page(digits):
    history = deepcopy(digits['history'])
    history.rows[1].update(train_loss=math.inf, valid_loss=math.nan)
    rows = read(report_html(**(digits | dict(history=history))))['rows']
    assert rows[1]['train_loss'] is None and rows[1]['valid_loss'] is None and rows[2]==history.rows[2]

def test_times_adds_up_to_the_clock(monkeypatch):
    now = [0.]
    monkeypatch.setattr('minibatch.cli.time.perf_counter', lambda: now[0])
    times = Times()
    class Slow(Callback):                        # runs after Times at each hook, and takes a second there
        def before_batch(self, run): now[0] += 1
        def after_batch(self, run): now[0] += 10
        def after_epoch(self, run): now[0] += 100
    x,y = torch.randn(8, 784),torch.arange(8)
    net = mlp(784, 4, 10)
    fit(2, net, cross_entropy, SGD(net.parameters(), lr=0.1), [(x,y)]*3, [(x,y)], cbs=[Slow(), times], progress=False)
    assert dict(times.seconds)=={'between epochs': 200, 'next batch': 40, 'forward': 6, 'backward': 0, 'update': 0, 'validation': 20}

# ---------------------------------------------------------------- in a browser
@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install playwright')
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path: pytest.skip("there is no Chromium here: apt-get install chromium")
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox', '--disable-background-networking', '--disable-component-update', '--disable-sync'])
        yield b
        b.close()

@pytest.fixture
def show(browser, tmp_path):
    "A function that opens a page, which may complain of nothing and fetch nothing"
    contexts,wrong = [],[]
    def show(html, width=1280, **kw):
        (tmp_path/'report.html').write_text(html, encoding='utf-8')
        contexts.append(browser.new_context(viewport=dict(width=width, height=900), **kw))
        page = contexts[-1].new_page()
        page.on('pageerror', lambda e: wrong.append(str(e)))
        page.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
        page.on('request', lambda r: None if r.url.endswith('/report.html') or r.url.startswith('data:') else wrong.append(r.url))
        page.goto((tmp_path/'report.html').as_uri())
        page.evaluate('ready.then(() => 0)')
        return page
    yield show
    for c in contexts: c.close()
    assert not wrong

def scores(page, x): return torch.tensor(page.evaluate('async xs => { const net = await ready; return xs.map(x => Array.from(forward(net, Float32Array.from(x)))) }', x.tolist()))

def points(page, digit):
    square = page.locator('#square')
    square.scroll_into_view_if_needed()
    b = square.bounding_box()
    return [[(b['x']+u*b['width'], b['y']+v*b['height']) for u,v in stroke] for stroke in BOX[digit]]

def by_mouse(page, digit):
    for (first,*rest) in points(page, digit):
        page.mouse.move(*first)
        page.mouse.down()
        for p in rest: page.mouse.move(*p, steps=6)
        page.mouse.up()

def by_touch(page, digit):
    "Events as a touch screen sends them, which `touch-action: none` must keep from scrolling the page"
    cdp = page.context.new_cdp_session(page)
    def send(kind, *at): cdp.send('Input.dispatchTouchEvent', dict(type=kind, touchPoints=[dict(x=x, y=y) for x,y in at]))
    for (first,*rest) in points(page, digit):
        send('touchStart', first)
        for a,b in zip([first,*rest], rest):
            for k in range(1, 7): send('touchMove', (a[0]+(b[0]-a[0])*k/6, a[1]+(b[1]-a[1])*k/6))
        send('touchEnd')

def reads(page, digit, draw):
    "Draw on an empty square; True if the page reads it as `digit`"
    page.locator('#clear').click()
    draw(page, digit)
    page.wait_for_function("document.querySelector('#says b')")
    page.evaluate('new Promise(requestAnimationFrame)')              # the last points have been drawn
    best = page.locator('.bar.best span').first.inner_text()
    assert page.locator('#says b').inner_text()==best
    return best==digit

@pytest.mark.site
@pytest.mark.parametrize('which', ['digits', 'digits_cnn'])
def test_the_pages_net_is_pytorchs(which, show, request):
    args = request.getfixturevalue(which)
    x,page = args['data'][2][:200],show(report_html(**args))
    half = which=='digits_cnn'
    net = args['model']
    if half: net = deepcopy(net).half().float()                      # the weights that are in the page
    want,got = predict(net, [x]),scores(page, x)
    assert (got-want).abs().max()<1e-4 and (got-predict(args['model'], [x])).abs().max()<(2e-2 if half else 1e-4)
    assert got.argmax(1).equal(args['preds'][:200].argmax(1))
    p = torch.tensor(page.evaluate('s => s.map(softmax)', got.tolist()))
    assert (p-want.softmax(1)).abs().max()<1e-4

@pytest.mark.site
def test_half_numbers(show, digits):
    h = torch.tensor([0., -0., 1, -2.5, 65504, 6e-8, 6.1e-5, 3.14159], dtype=torch.float16)
    got = show(report_html(**digits)).evaluate('bits => bits.map(half)', h.view(torch.int16).int().bitwise_and(0xffff).tolist())
    assert torch.tensor(got).equal(h.float())

@pytest.mark.site
@pytest.mark.parametrize('draw', [by_mouse, by_touch])
def test_digits_drawn_for_the_default_net(draw, show, tmp_path, bare, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([])==0
    html = (tmp_path/'minibatch-run'/'report.html').read_text(encoding='utf-8')
    assert str(tmp_path) not in html and str(Path.home()) not in html and '--seed 42' in show(html).locator('#repeat').inner_text()
    page = show(html, width=390 if draw is by_touch else 1280, has_touch=draw is by_touch)
    for digit in '107': assert reads(page, digit, draw), digit
    assert draw is by_mouse or page.evaluate('document.documentElement.scrollWidth')==390
    page.locator('#undo').click()
    assert 'Draw a digit' in page.locator('#says').inner_text()

@pytest.mark.site
def test_digits_drawn_for_an_mnist_cnn(show, shared, monkeypatch):
    monkeypatch.setenv('MINIBATCH_DATA', str(shared))
    page = show(report_html(**small_run('mnist', 'cnn', epochs=1, n=6000)), has_touch=True)
    for draw in by_mouse,by_touch:
        for digit in '107': assert reads(page, digit, draw), digit

@pytest.mark.site
def test_a_drawing_is_centred_and_scaled_as_mnist_is(show, digits):
    page = show(report_html(**(digits | dict(settings=dict(dataset='mnist')))))
    for s in ([[[.1,.1], [.15,.3]]], [[[.2,.9], [.8,.2], [.8,.9]]], [[[.5,.5]]]):
        x = torch.tensor(list(page.evaluate('s => Array.from(see(s))', s))).view(28, 28)
        where = torch.arange(28)+.5
        for k in 0,1: assert (x.sum(1-k)@where/x.sum()).item()==pytest.approx(14, abs=0.1)     # the centre of mass
        rows,cols = [(x.amax(1-k)>0.02).nonzero().flatten() for k in (0,1)]
        size = max(r[-1]-r[0]+1 for r in (rows,cols)).item()
        assert 20<=size<=21 if len(s[0])>1 else size<5                                          # a dot stays small
    assert 0<=x.min() and x.max()<=1

@pytest.mark.site
def test_blocks_are_stretched_as_the_digits_are(show, digits):
    page,x = show(report_html(**digits)),torch.rand(8, 8)
    want = nn.functional.interpolate(x[None,None], size=20, mode='bilinear').flatten()
    got = torch.tensor(page.evaluate('x => Array.from(stretch(x, 8, 20))', x.flatten().tolist()))
    assert (got-want).abs().max()<1e-5

@pytest.mark.site
def test_cells_curves_and_mistakes(show, digits):
    page,table = show(report_html(**digits)),confusion(digits['preds'], digits['data'][3])
    cells = page.locator('#confusion button')
    assert [int(t or 0) for t in cells.all_inner_texts()]==table.flatten().tolist()
    for i in (0, int((table-table.diag().diag()).argmax())):
        cells.nth(i).click()
        n = table.flatten()[i].item()
        assert f'read as {i%10}: {n} of {table[i//10].sum()} images' in page.locator('#cell').inner_text()
        assert page.locator('#cell-images canvas').count()==min(n, 24)
    assert page.locator('#mistakes canvas').count()==min(24, 297-table.trace().item())
    assert page.locator('#weights canvas').count()==50
    rows = digits['history'].rows
    for k,chart in enumerate(page.locator('.chart svg').all()):
        chart.scroll_into_view_if_needed()
        b = chart.bounding_box()
        for share,row in ((.11,rows[0]), (.96,rows[-1])):
            page.mouse.move(b['x']+share*b['width'], b['y']+b['height']/2)
            said = page.locator('.chart output').nth(k).inner_text()
            assert f"epoch {row['epoch']}" in said
            for name in (('train_loss','valid_loss'), ('accuracy',))[k]: assert f'{name} {row[name]:.4f}' in said

@pytest.mark.site
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_light_and_dark(show, digits, scheme):
    page = show(report_html(**digits), width=390, color_scheme=scheme)
    assert page.evaluate('document.documentElement.scrollWidth')==390
    def light(selector, what):
        rgb = [int(v)/255 for v in re.findall(r'\d+', page.evaluate('([s, w]) => getComputedStyle(document.querySelector(s))[w]', [selector, what]))[:3]]
        return sum(w*(v/12.92 if v<=.04045 else ((v+.055)/1.055)**2.4) for w,v in zip((.2126,.7152,.0722), rgb))
    back = light('body', 'backgroundColor')
    assert (back<.1)==(scheme=='dark')
    for s in 'body', '.soft', '#accuracy b', 'dt', 'summary':
        a,b = sorted([back, light(s, 'color')])
        assert (b+.05)/(a+.05)>4.5, s                                # the contrast that WCAG 2 asks of text

@pytest.mark.site
def test_kmnist_shows_what_to_copy(show, digits):
    kuzushiji = digits | dict(classes=dataset_classes('kmnist'), settings=dict(dataset='kmnist'))
    page = show(report_html(**kuzushiji), width=390)
    assert page.locator('#copy canvas').count()==30 and page.locator('#copy figcaption').all_inner_texts()==dataset_classes('kmnist')
    assert page.evaluate('document.documentElement.scrollWidth')==390
    boxes = [f.bounding_box() for f in page.locator('#copy figure').all()]
    assert not any(a['y']==b['y'] and a['x']+a['width']>b['x'] for a,b in zip(boxes, boxes[1:]))     # none lies over the next
    assert 'CC BY-SA' in page.locator('#credit').inner_text()

@pytest.mark.site
@pytest.mark.parametrize('width', [390, 1280])
def test_47_classes_nan_and_a_net_that_is_always_right(show, digits, width):
    x,y = digits['data'][2:]
    labels = torch.arange(len(y))%47
    preds = nn.functional.one_hot(labels, 47)*20.
    history = deepcopy(digits['history'])
    history.rows[1].update(train_loss=math.inf, valid_loss=math.nan)
    classes = ['<script>throw 1</script>', *(f'class number {i}' for i in range(1, 47))]
    page = show(report_html(mlp(784, 10, 47), preds, (x, labels, x, labels), history, classes), width=width)
    assert page.evaluate('document.documentElement.scrollWidth')==width
    assert 'There are none' in page.locator('#mistakes-text').inner_text() and page.locator('#cell-images canvas').count()==7
    assert page.locator('.bar').count()==47 and page.locator('.bar').first.bounding_box()['height']<30
    assert 'NaN' not in page.locator('#charts').inner_html()
    page.locator('summary', has_text='The table').click()
    assert page.locator('#table td', has_text='no number').count()==2
    chart = page.locator('.chart svg').first
    chart.scroll_into_view_if_needed()
    b = chart.bounding_box()
    page.mouse.move(b['x']+b['width']*(40+328/(len(history.rows)-1))/380, b['y']+b['height']/2)
    assert 'valid_loss no number' in page.locator('.chart output').first.inner_text()
