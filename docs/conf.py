"How Sphinx builds the website: `make site`"
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent)]           # the package and pages.py beside this file
import pages

settings = ConfigParser(delimiters=['='])
settings.read(here.parent/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
pages.write(here.parent/'nbs', here)                    # docs/lessons, docs/reference, docs/_extra

project,author,copyright = 'minibatch',settings['author'],settings['copyright']
version = release = settings['version']
extensions = ['myst_nb', 'pages']
exclude_patterns = ['_extra', '_static']

nb_execution_mode = 'off'                               # pages show the outputs that the notebooks store
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_block']
myst_dmath_double_inline = True
myst_heading_anchors = 3
python_maximum_signature_line_length = 70
add_module_names = False
smartquotes = False                                     # '--out' and 'mean' are to be typed as they stand

html_theme = 'furo'
html_title = 'minibatch'
html_favicon = '_static/icon.svg'
html_static_path = ['_static']
html_extra_path = ['_extra']
html_css_files = ['site.css']
html_js_files = ['site.js']
html_math_renderer = 'mathml'
html_copy_source = False
html_use_index = False                                  # reference/index is the list of names
html_show_sphinx = False
