"Make README.md (and its pictures) from nbs/index.ipynb"
import re, shutil
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parents[1]
nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
nb.metadata['language_info'] = {'name': 'python'}              # so that code blocks are coloured
text, res = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': 'README_files', 'unique_key': 'README'})
text = re.sub(r'\]\((?=\d\d_|a\d_|solutions)', '](nbs/', text)      # links between notebooks, as seen from the root
text = re.sub(r'\n{3,}', '\n\n', text)
(root/'README.md').write_text(text.strip() + '\n', encoding='utf-8')
shutil.rmtree(root/'README_files', ignore_errors=True)
for name,data in res['outputs'].items():
    (root/name).parent.mkdir(exist_ok=True)
    (root/name).write_bytes(data)
