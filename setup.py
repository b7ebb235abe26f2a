"Everything that pip needs to know is in settings.ini; this file only hands it over."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
source = f"https://github.com/{cfg['user']}/{cfg['repo']}"

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], license='Apache-2.0', packages=['minibatch', 'minibatch.nbs'],
    package_dir={'minibatch.nbs': 'nbs'},                # `minibatch exercises` makes its notebooks from the lessons
    package_data={'minibatch': ['digits.npz', 'digits.md', 'report.html', 'py.typed'], 'minibatch.nbs': ['0*.ipynb']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'site': cfg['site_requirements'].split(), 'peers': cfg['peers_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    project_urls={'Source': source, 'Documentation': f"https://{cfg['user']}.github.io/{cfg['repo']}/", 'Changes': f"{source}/blob/{cfg['branch']}/CHANGELOG.md", 'Issues': f'{source}/issues'},
    classifiers=['Intended Audience :: Education', 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
