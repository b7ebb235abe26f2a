"""Make pages from the notebooks and the package, each kind by one rule.

- `lessons/`: the notebooks with their stored outputs; marks become labels, imports and solutions fold
- `reference/`: every public name, from its docstring and the comments beside its parameters
- `_extra/`: each lesson as notebook and as MyST text, to take away
"""
import ast, inspect, re, textwrap
from base64 import b64decode
from importlib import import_module
from importlib.resources import files
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, OP, generate_tokens
import jupytext, nbformat
from docutils import nodes
from latex2mathml.converter import convert
from mdit_py_plugins.anchors.index import slugify
from nbformat.v4 import new_markdown_cell
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

made = set()                                            # every file that was written or found to be as it should

def put(path, text):
    "Write `text` (or bytes) unless it is there already, so that a second build only does what is new"
    data = text.encode() if isinstance(text, str) else text
    made.add(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes()!=data: path.write_bytes(data)

def lessons(nbs):
    "The notebooks in reading order: 00, 01, ..., a0, a1, ..."
    return sorted(p for p in Path(nbs).glob('*.ipynb') if re.match(r'[0-9a]\d_', p.name))

def number(stem):
    "How a lesson is called: `03_loop` is 3, `a0_files` is A0"
    n = stem.split('_')[0]
    return n.upper() if n[0]=='a' else str(int(n))

def called(stem): return ('appendix ' if stem[0]=='a' else 'lesson ')+number(stem)
def source(cell): return re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
def marked(cell, mark): return re.search(rf'^#\| *{mark}\b *(\S*)', cell.source, re.M)
def read(path): return nbformat.read(path, as_version=4)

def module_of(nb):
    "The module that a lesson makes"
    return next((m[1] for c in nb.cells if (m := marked(c, 'default_exp'))), None)

def mostly_imports(code):
    "Are at least three statements of four in `code` imports and settings?"
    if not code or re.search(r'^\s*[%!]', code, re.M): return False
    setting = lambda o: re.match(r'plt\.rcParams|warnings\.|os\.environ', ast.unparse(o))
    body = ast.parse(code).body
    return sum(1 for o in body if isinstance(o, (ast.Import,ast.ImportFrom)) or setting(o)) >= 0.75*len(body)

# Lessons ------------------------------------------------------------------------------------------------------

def fold(cell, summary):
    cell.metadata['tags'] = [*cell.metadata.get('tags', []), 'hide-input']
    cell.metadata['mystnb'] = {'code_prompt_show': summary, 'code_prompt_hide': summary}

def tidy(nb):
    "Marks for nbdev become tags (which the style sheet shows as labels); imports and lists of mistakes fold"
    for c in nb.cells:
        if c.cell_type!='code': continue
        export,hide,exp = marked(c, 'export'),marked(c, 'hide'),marked(c, 'default_exp')
        c.source = source(c)
        if export: c.metadata['tags'] = ['export']
        if not exp and mostly_imports(c.source): fold(c, 'Imports of the module' if export else 'Imports')
        elif exp or hide: c.metadata['tags'] = ['remove-cell']
        pieces = re.findall(r'^(\w+) = Piece\(', c.source, re.M)
        if pieces and c.source.count('\n')>12: fold(c, f'Cases and mistakes of {", ".join(pieces)}')
    nb.metadata['language_info'] = {'name': 'python', 'pygments_lexer': 'python'}

def lesson_page(path):
    "The notebook with its number in the title and a line that says what it makes and where else it is"
    nb = read(path)
    mod,stem = module_of(nb),path.stem
    tidy(nb)
    about = [f'makes [`minibatch.{mod}`](../reference/{mod}.md)'] if mod else []
    about += [f'<a href="../notebooks/{stem}.ipynb" download>notebook</a>',
              f'<a href="../text/{stem}.md">MyST text</a>']
    top = f'# {number(stem)} · \\1\n\n:::{{container}} about\n{" · ".join(about)}\n:::\n'
    nb.cells[0].source = re.sub(r'^# (.*)\n?', top, nb.cells[0].source, count=1)
    return nb

def solution_page(path, name):
    "The solutions, each folded under its heading"
    nb = read(path)
    tidy(nb)
    title = f'# Solutions {number(path.stem)} · {name}'
    nb.cells[0].source = re.sub(r'^# .*', title, nb.cells[0].source, count=1)
    cells,is_open = [],False
    for c in nb.cells:
        m = c.cell_type=='markdown' and re.match(r'(?:## *(.*)|\*\*(\d+\..*?)\*\*)\s*([\s\S]*)', c.source)
        if not m:
            cells.append(c)
            continue
        title = (m[1] or m[2]).rstrip('.')
        if title.isdigit(): title = f'Exercise {title}'
        before = '</details>\n\n' if is_open else ''
        opening = '<details class="solution"><summary>Solution</summary>'
        cells.append(new_markdown_cell(f'{before}## {title}\n\n{opening}\n\n{m[3]}', id=c.id))
        is_open = True
    nb.cells = cells+[new_markdown_cell('</details>', id='end')]*is_open
    return nb

def as_text(path):
    "The lesson as MyST text, which must come back as the same cells"
    nb = read(path)
    nb.metadata['kernelspec'] = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
    text = jupytext.writes(nb, 'md:myst')
    cells = lambda nb: [(c.cell_type, c.source) for c in nb.cells]
    if cells(jupytext.reads(text, 'md:myst'))==cells(nb): return text
    raise ValueError(f'{path.name} does not come back from its MyST text')

def picture(nbs, stem, words):
    "The picture of the first cell of a lesson that has `words` in its code"
    for c in read(Path(nbs)/f'{stem}.ipynb').cells:
        if c.cell_type=='code' and words in c.source:
            for o in c.outputs:
                if 'image/png' in o.get('data', {}): return b64decode(o.data['image/png'])
    raise ValueError(f'{stem} has no cell with {words!r} and a picture, which the front page shows')

# Reference ----------------------------------------------------------------------------------------------------

def places(nbs):
    "Where each exported name is defined: name -> (link to the section, its heading)"
    res = {}
    for path in lessons(nbs):
        nb,head = read(path),''
        mod = module_of(nb)
        for c in nb.cells:
            if c.cell_type=='markdown':
                text = re.sub(r'^```[\s\S]*?^```', '', c.source, flags=re.M)
                head = ([head]+re.findall(r'^##+ (.*)', text, re.M))[-1]
            elif marked(c, 'export'):
                link = f'../lessons/{path.name}#{slugify(head)}'
                for o in ast.parse(source(c)).body:
                    if isinstance(o, (ast.FunctionDef,ast.ClassDef)): names = [o.name]
                    else: names = [t.id for t in getattr(o, 'targets', []) if isinstance(t, ast.Name)]
                    for n in names: res.setdefault(f'{mod}.{n}', (link, path.stem, head))
    return res

def code(s): return '`` '+s.replace('|', '\\|')+' ``' if '`' in s else '`'+s.replace('|', '\\|')+'`'
def prose(s):
    "A comment as Markdown: what is in backticks stays, what would be markup elsewhere is escaped"
    parts = re.split(r'(`[^`]*`)', ' '.join(s.split()))
    return ''.join(re.sub(r'\|' if p.startswith('`') else r'[<*$|\[\]]', r'\\\g<0>', p) for p in parts)

def tree(o):
    "The syntax tree of a function or class"
    return ast.parse(textwrap.dedent(inspect.getsource(o))).body[0]

def signature(f):
    node = tree(f)
    args = node.args
    args.posonlyargs,args.args = [[a for a in l if a.arg not in ('self','cls')] for l in (args.posonlyargs,args.args)]
    return f'({ast.unparse(args)})'+(f' -> {ast.unparse(node.returns)}' if node.returns else '')

def raised(f, seen):
    "What `f` and the private helpers that it calls raise: [(exception, message)]"
    if f in seen: return
    seen.add(f)
    for o in ast.walk(tree(f)):
        if isinstance(o, ast.Raise) and isinstance(o.exc, ast.Call) and o.exc.args:
            if re.match('[A-Z]', e := ast.unparse(o.exc.func)): yield e,message(o.exc.args[0])
        elif isinstance(o, ast.Call) and isinstance(o.func, ast.Name) and o.func.id.startswith('_'):
            g = f.__globals__.get(o.func.id)
            ours = inspect.isfunction(g) and g.__module__.startswith('minibatch')
            if ours: yield from raised(g, seen)

def message(o):
    "The text of an error; what is filled in stands as its name, or as dots"
    if isinstance(o, ast.JoinedStr): return re.sub('…{2,}', '…', ''.join(map(message, o.values)))
    if isinstance(o, ast.BinOp): return message(o.left)+message(o.right)
    if isinstance(o, ast.FormattedValue): return message(o.value)
    if isinstance(o, ast.Name) and o.id[0]!='_': return f'`{o.id}`'
    return o.value if isinstance(o, ast.Constant) and isinstance(o.value, str) else '…'

def comments(f):
    "The comments beside parameters, as [(parameters, comment)], and that on what is returned"
    src = textwrap.dedent(inspect.getsource(f))
    node = ast.parse(src).body[0]
    args = node.args
    params = [p for p in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if p]
    stars = {args.vararg: '*', args.kwarg: '**'}
    notes,depth,end = {},0,None
    for t in generate_tokens(StringIO(src).readline):
        if t.type==COMMENT: notes[t.start[0]] = (t.string.lstrip('# '), t.line.strip().startswith('#'))
        elif t.string in '([{' and t.type==OP: depth += 1
        elif t.string in ')]}' and t.type==OP: depth -= 1
        elif t.string==':' and not depth and end is None: end = t.start[0]
        if end and t.start[0]>end: break
    rows,open_,returns = [],[],''               # open: parameters that wait for a comment
    for line in range(node.lineno, end+1):
        open_ += [stars.get(p, '')+p.arg for p in params if p.lineno==line and p.arg not in ('self','cls')]
        text,alone = notes.get(line, ('', False))
        if line==end and node.returns or text and not open_ and not alone: returns = text
        elif text and open_:
            rows.append([open_, text])
            open_ = []
        elif text: rows[-1][1] += ' '+text               # a second line of the same comment
    return rows+[[open_, '']]*bool(open_), returns

def describe(f):
    "A table of what a function takes, then what it returns and raises"
    rows,returns = comments(f)
    res = []
    if any(text for _,text in rows):
        table = [f'| {", ".join(map(code, names))} | {prose(text)} |' for names,text in rows]
        res += ['| parameter | meaning |', '| --- | --- |', *table, '']
    if returns: res += [f'**Returns** {prose(returns)}', '']
    errors = dict.fromkeys(raised(f, set()))
    if errors: res += ['**Raises**', '', *(f'- {code(e)}: {prose(m)}' for e,m in errors), '']
    return res

def entry(kind, name, sig, text, body, mod):
    return [f'::::{{py:{kind}}} {name}{sig}', f':module: minibatch.{mod}', '', prose(text), '', *body, '::::', '']

def members(cls):
    "The public methods and properties that a class defines itself"
    for name,o in vars(cls).items():
        f = o.fget if isinstance(o, property) else getattr(o, '__func__', o)
        if not name.startswith('_') and inspect.isfunction(f) and f.__doc__: yield name,o,f

def doc(o):
    "The docstring of a function, a class, or an object that has one of its own"
    own = isinstance(o, type) or inspect.isfunction(o) or '__doc__' in getattr(o, '__dict__', {})
    return own and o.__doc__ or ''

def document(name, o, mod, where):
    link,stem,head = where[f'{mod}.{name}']
    origin = [f'From [{called(stem)}: {head}]({link}).', '']
    if inspect.isfunction(o): return entry('function', name, signature(o), doc(o), describe(o)+origin, mod)
    if not isinstance(o, type):
        kind,sig = ('function',inspect.signature(o)) if callable(o) else ('data','')
        return entry(kind, name, sig, doc(o), origin, mod)
    init = vars(o).get('__init__')
    sig,body = (signature(init),describe(init)) if init else ('',[])
    res = entry('class', name, sig, doc(o), body+origin, mod)
    for m,p,f in members(o):
        if isinstance(p, property): res += entry('property', f'{name}.{m}', '', doc(f), [], mod)
        else: res += entry('method', f'{name}.{m}', signature(f), doc(f), describe(f), mod)
    return res

def reference(nbs, to):
    "A page for each module, and one with all names"
    where,mods = places(nbs),[]
    index = ['# Reference', '', 'Every public name, from its docstring and the comments beside its parameters. '
             '`from minibatch.all import *` brings them all, but for the commands and what is in `minibatch.check`.', '']
    for path in lessons(nbs):
        mod = module_of(read(path))
        if not mod: continue
        m = import_module(f'minibatch.{mod}')
        page = [f'# minibatch.{mod}', '', prose(m.__doc__ or ''), '']
        made_in = f'Made in [{called(path.stem)}](../lessons/{path.name}).'
        index += [f'## [minibatch.{mod}]({mod}.md)', '', made_in, '', '| name | what it is |', '| --- | --- |']
        for name in m.__all__:
            o = getattr(m, name)
            page += document(name, o, mod, where)
            index.append(f'| [`{name}`](#minibatch.{mod}.{name}) | {prose(doc(o))} |')
        index.append('')
        put(to/f'{mod}.md', '\n'.join(page))
        mods.append(mod)
    put(to/'index.md', '\n'.join([*index, '```{toctree}', ':hidden:', '', *mods, '```', '']))

def write(nbs, docs):
    "All pages that are made"
    for path in lessons(nbs):
        put(docs/'lessons'/path.name, nbformat.writes(lesson_page(path)))
        put(docs/'_extra'/'notebooks'/path.name, path.read_text(encoding='utf-8'))
        put(docs/'_extra'/'text'/f'{path.stem}.md', as_text(path))
        title = re.match('# (.*)', read(path).cells[0].source)[1]
        solutions = Path(nbs)/'solutions'/path.name
        if solutions.exists():
            put(docs/'lessons'/'solutions'/path.name, nbformat.writes(solution_page(solutions, title)))
    reference(nbs, docs/'reference')
    put(docs/'_extra'/'fonts'/'math.ttf', (files('ziamath')/'fonts'/'STIXTwoMath-Regular.ttf').read_bytes())
    put(docs/'lessons'/'digits.png', picture(nbs, '00_datasets', 'show_images'))
    put(docs/'lessons'/'loss.png', picture(nbs, '03_loop', 'Training loss over three epochs'))
    for folder in ('lessons', 'reference', '_extra'):       # what a lesson that has gone left behind
        for path in (docs/folder).rglob('*.*'):
            if path not in made: path.unlink()

# What Sphinx calls --------------------------------------------------------------------------------------------

class Links(SphinxTransform):
    "Make `lesson 6` and `nbs/solutions/06_data.ipynb`, where a text names them, links"
    default_priority = 5
    def apply(self):
        docs = {number(d.split('/')[-1]):d for d in self.env.found_docs if re.match(r'lessons/\w+$', d)}
        inside = (nodes.literal, nodes.literal_block, nodes.reference, nodes.title, nodes.raw, pending_xref)
        for t in [*self.document.findall(nodes.Text)]:
            p,new = t.parent,[]
            if isinstance(p, nodes.literal) and not isinstance(p.parent, nodes.reference):
                doc = re.sub(r'^nbs/(.*)\.ipynb$', r'lessons/\1', t)
                if doc in self.env.found_docs: p.parent.replace(p, self.link(doc, p.deepcopy()))
                continue
            while p and not isinstance(p, inside): p = p.parent
            parts = [] if p else re.split(r'\b([Ll]esson (\d+))\b', t)
            for text,whole,n in zip(parts[::3], [*parts[1::3],''], [*parts[2::3],'']):
                here = docs.get(n) in (None,self.env.docname)
                new += [nodes.Text(text), nodes.Text(whole) if here else self.link(docs[n], nodes.inline(whole, whole))]
            if len(new)>2: t.parent.replace(t, new)
    def link(self, doc, shown):
        return pending_xref('', shown, refdomain='std', reftype='doc', reftarget='/'+doc, refdoc=self.env.docname,
                            refexplicit=True)

def mathml(self, node, display):
    math = convert(node.astext(), display=display)
    self.body.append(math.replace('<mo>&#x0221E;</mo>', '<mi>∞</mi>'))      # a number, and no operator
    raise nodes.SkipNode

def setup(app):
    app.add_transform(Links)
    inline,block = ((lambda self,node,d=d: mathml(self, node, d), None) for d in ('inline','block'))
    app.add_html_math_renderer('mathml', inline, block)
    return {'parallel_read_safe': True}
