"The website: it builds without a warning, every link leads somewhere, and a browser shows every page as it should"
import os, re, shutil, subprocess, sys, time
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest

for name in ('myst_nb', 'furo', 'jupytext', 'latex2mathml', 'ziamath', 'playwright'): pytest.importorskip(name, reason='needs pip install -e ".[site]"')
import jupytext, nbformat
from playwright.sync_api import sync_playwright

pytestmark = pytest.mark.site
root = Path(__file__).parents[1]
lessons = sorted(p for p in (root/'nbs').glob('*.ipynb') if re.match(r'[0-9a]\d_', p.name))
WIDTHS = (390, 1280)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built anew; a warning is an error"
    out = tmp_path_factory.mktemp('site')
    start = time.perf_counter()
    r = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-E', '-d', str(out/'doctrees'), str(root/'docs'), str(out/'html')],
                       env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert time.perf_counter()-start < 180
    return out/'html'

@pytest.fixture(scope='module')
def html(site):
    "path -> what is in the page: its ids, its links, its text"
    return {p: Page(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}

class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids,self.links,self.text = set(),[],''
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        for k,v in attrs:
            if k=='id' or (k=='name' and tag=='a'): self.ids.add(v)
            if k in ('href','src') and v: self.links.append(v)
    def handle_data(self, data): self.text += data

@pytest.fixture(scope='module')
def browser():
    exe = next((e for n in ('chromium','chromium-browser','google-chrome') if (e := shutil.which(n))), None)
    if exe is None: pytest.fail('needs a Chromium: apt-get install chromium')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync'])
        yield b
        b.close()

@pytest.fixture
def tab(browser):
    "A tab that notes what goes wrong in `tab.trouble`"
    t = browser.new_page()
    t.trouble = []
    t.on('console', lambda m: t.trouble.append(m.text) if m.type in ('error','warning') else None)
    t.on('pageerror', lambda e: t.trouble.append(str(e)))
    t.on('requestfailed', lambda r: None if 'ABORTED' in r.failure else t.trouble.append(f'{r.url}: {r.failure}'))    # aborted: the page was left
    t.on('request', lambda r: None if r.url.startswith(('file:','data:')) else t.trouble.append(f'asks for {r.url}'))
    yield t
    t.close()

def test_every_lesson_has_its_pages(site):
    for p in lessons:
        assert (site/'lessons'/p.with_suffix('.html').name).exists()
        if (p.parent/'solutions'/p.name).exists(): assert (site/'lessons'/'solutions'/p.with_suffix('.html').name).exists()

def test_links_lead_somewhere(html):
    bad = []
    for page,content in html.items():
        for link in content.links:
            u = urlsplit(link)
            if u.scheme or link.startswith('//'):
                if u.scheme not in ('http','https','data','mailto') or (u.scheme!='data' and not (u.netloc or u.path)): bad.append((page.name, link))
                continue
            to = page if not u.path else (page.parent/unquote(u.path)).resolve()
            if not to.is_file(): bad.append((page.name, link))
            elif u.fragment and to.suffix=='.html' and unquote(u.fragment) not in html[to].ids: bad.append((page.name, link))
    assert not bad

def test_lessons_link_to_one_another(html, site):
    "Where a text names another lesson, it links to it"
    text = html[site/'lessons'/'03_loop.html']
    assert {'00_datasets.html','solutions/03_loop.html'} <= set(text.links)

def test_marks_do_not_show(html):
    for page,content in html.items(): assert not re.search(r'^\s*#\| *(export|hide|default_exp)', content.text, re.M), page.name

def test_myst_text_comes_back(site):
    for p in lessons:
        back = jupytext.read(site/'text'/f'{p.stem}.md', fmt='md:myst')
        cells = lambda nb: [(c.cell_type, c.source) for c in nb.cells]
        assert cells(back)==cells(nbformat.read(p, as_version=4))
        assert back.metadata.kernelspec.name=='python3'
        assert (site/'notebooks'/p.name).read_bytes()==p.read_bytes()

def test_reference_has_every_public_name(html, site):
    ids = set().union(*(c.ids for p,c in html.items() if p.parent==site/'reference'))
    modules = [import_module(f'minibatch.{p.stem}') for p in (root/'minibatch').glob('[a-z]*.py')]
    names = {f'{m.__name__}.{n}' for m in modules for n in getattr(m, '__all__', ())}
    assert len(names)>60
    assert not names-ids
    loss = html[site/'reference'/'losses.html'].text
    for part in ('label_smoothing', 'share of the truth', 'Returns', 'Raises', 'expected floating-point', 'lesson 2'): assert part in loss

def test_front_page_shows_what_check_says():
    check = pytest.importorskip('minibatch.check')
    page = (root/'docs'/'index.md').read_text(encoding='utf-8')
    code,said = (re.search(rf'```{lang}\n(.*?)```', page, re.S)[1] for lang in ('python', 'text'))
    with pytest.raises(check.Wrong) as e: exec('import torch\n'+code, {})
    assert str(e.value).split()==said.split()

@pytest.mark.parametrize('width', WIDTHS)
def test_every_page_opens(site, tab, width):
    "From files: nothing missing, nothing from the network, nothing wider than the window, formulas drawn"
    tab.set_viewport_size({'width': width, 'height': 844})
    for page in sorted(site.rglob('*.html')):
        tab.goto(page.as_uri())
        got = tab.evaluate(r'''() => ({
            wide: Math.max(0, document.documentElement.scrollWidth - innerWidth),
            cut: [...document.querySelectorAll('article *')].filter(e => {
                if (!e.checkVisibility() || e.getBoundingClientRect().right <= innerWidth+1) return false
                for (let p = e.parentElement; p.tagName != 'ARTICLE'; p = p.parentElement)
                    if (/auto|scroll/.test(getComputedStyle(p).overflowX)) return false
                return true }).map(e => e.outerHTML.slice(0, 99)),
            broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
            flat: [...document.querySelectorAll('math')].filter(m => m.checkVisibility() && !m.getBoundingClientRect().height).length,
            raw: [...document.querySelectorAll('article p, article li, article td')].map(e => {
                const c = e.cloneNode(true)
                c.querySelectorAll('code, pre, math').forEach(o => o.remove())
                return c.textContent }).filter(t => /\\(frac|sum|text|log|partial)|\$.+\$/.test(t))})''')
        assert got=={'wide': 0, 'cut': [], 'broken': [], 'flat': 0, 'raw': []}, page.name
    assert not tab.trouble

def test_formulas(site, tab):
    tab.goto((site/'lessons'/'02_losses.html').as_uri())
    assert tab.locator('math').count()>10
    assert tab.locator('merror').count()==0
    assert tab.evaluate("document.fonts.load('16px Formulas').then(f => f.length)")==1
    small,big = (tab.locator(f'math {part}').first.bounding_box()['height'] for part in ('mi', 'mfrac'))
    assert big>1.5*small                            # a fraction stands on two lines

def test_search(site, tab):
    tab.goto((site/'search.html').as_uri()+'?q=ragged')
    tab.wait_for_function("document.querySelector('#search-results .search-summary')?.innerText.match(/\\d/)")
    found = [a.get_attribute('href') for a in tab.locator('#search-results li a').all()]
    for n in ('03_loop','07_fit'): assert any(f'lessons/{n}.html' in f for f in found), found
    assert not tab.trouble

def test_next_and_previous_walk_through_the_lessons(site, tab):
    tab.goto((site/'index.html').as_uri())
    seen = []
    for _ in lessons:
        tab.locator('a.next-page').click()
        seen.append(Path(urlsplit(tab.url).path).stem)
    assert seen==[p.stem for p in lessons]
    for stem in seen[-2::-1]:
        tab.locator('a.prev-page').click()
        assert Path(urlsplit(tab.url).path).stem==stem

def test_solutions_are_folded(site, tab):
    tab.goto((site/'lessons'/'solutions'/'03_loop.html').as_uri())
    folded = tab.locator('details.solution')
    assert folded.count()==4
    assert not folded.first.locator('.cell').first.is_visible()
    folded.first.locator('summary').first.click()
    assert folded.first.locator('.cell').first.is_visible()

CONTRAST = '''() => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number)
  const lum = c => { const [r,g,b] = c.map(v => (v/=255)<=.03928 ? v/12.92 : ((v+.055)/1.055)**2.4); return .2126*r+.7152*g+.0722*b }
  const ground = e => { for (; e; e=e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length<4 || c[3]>.9) return c.slice(0,3) } return [255,255,255] }
  const bad = {}
  for (const e of document.querySelectorAll('article *, .sidebar-tree a')) {
    if (![...e.childNodes].some(n => n.nodeType==3 && n.data.trim()) || !e.checkVisibility() || e.classList.contains('headerlink')) continue
    const [a,b] = [lum(rgb(getComputedStyle(e).color).slice(0,3)), lum(ground(e))].sort((x,y) => y-x)
    if ((a+.05)/(b+.05) < 4.5) bad[e.tagName+'.'+e.className+' '+e.innerText?.slice(0,20)] = ((a+.05)/(b+.05)).toFixed(1)
  }
  return bad }'''

@pytest.mark.parametrize('scheme', ('light','dark'))
def test_legible(site, tab, scheme):
    "Text stands out from its ground by 4.5 to 1, as WCAG AA asks, in light and dark"
    tab.emulate_media(color_scheme=scheme)
    for name in ('index', 'lessons/02_losses', 'lessons/12_compile', 'reference/training', 'lessons/solutions/03_loop'):
        tab.goto((site/f'{name}.html').as_uri())
        assert ('rgb(255, 255, 255)'==tab.evaluate('getComputedStyle(document.body).backgroundColor'))==(scheme=='light')
        assert not tab.evaluate(CONTRAST), name
