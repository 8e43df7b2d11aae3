"What `mkdocs` is told beyond mkdocs.yml: notebooks, modules and reports are pages too, where they lie in the repository."
import html, posixpath, re, shutil
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from mkdocs.structure.toc import get_toc

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ['mini', 'field']

# --- which pages there are ---

def notebooks(folder='nbs') -> list[str]: return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/folder).glob('*.ipynb'))

def modules() -> dict[str, str]:
    "{dotted name: its notebook}, in the order of the notebooks."
    found = {}
    for path in notebooks() + notebooks('nbs/appendix'):
        cells = [c.source for c in nbformat.read(ROOT/path, as_version=4).cells if c.cell_type == 'code']
        name = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(cells), re.M)
        if name and (ROOT/f'cmlf/{name[1].replace(".", "/")}.py').exists(): found[name[1]] = path
    return found

def summary(path) -> tuple[str, str]:
    "Title and first quoted line of a notebook."
    text = '\n'.join(c.source for c in nbformat.read(ROOT/path, as_version=4).cells[:3] if c.cell_type == 'markdown')
    title, line = re.search(r'^# (.+)', text, re.M), re.search(r'^> (.+(?:\n> .+)*)', text, re.M)
    return title[1] if title else Path(path).stem, line[1].replace('\n> ', ' ') if line else ''

def generated() -> dict[str, str]:
    "Pages that are written while building."
    own = {'contributing.md': (ROOT/'CONTRIBUTING.md').read_text(), 'changelog.md': (ROOT/'CHANGELOG.md').read_text()}
    api = {f'api/{m}.md': f'# cmlf.{m}\n\nDefined, explained and shown in [{nb}](../{nb}).\n\n::: cmlf.{m}\n'
           for m, nb in modules().items()}
    rows = [f'| [cmlf.{m}]({m}.md) | {summary(nb)[1]} | [{Path(nb).stem}](../{nb}) |' for m, nb in modules().items()]
    index = '# The library, module by module\n\n| module | what it holds | notebook |\n|---|---|---|\n' + '\n'.join(rows) + '\n'
    return own | api | {'api/index.md': index, 'reports/index.md': reports_page()}

def reports_page() -> str:
    lines = {'mini': 'synthesised soundscapes', 'field': 'scenes of real recordings'}
    text = '# Reports\n\nEach is one page with Tables I to III, curves, batches, and retrievals, as `cmlf reproduce` wrote it.\n\n'
    text += ''.join(f'- [{name}]({name}/index.html): {lines[name]}\n' for name in REPORTS)
    return text + '\nThe benchmark of mining against its competitors: [mining](benchmarks/mining.md).\n'

def on_config(config):
    rooms = [p for p in notebooks() if not p.endswith('/index.ipynb')]
    config.nav = [
        {'Home': 'index.md'},
        {'How to': ['howto/index.md', *(f'howto/{n}.md' for n in ('search', 'own_sounds', 'audiocaps', 'mining', 'cluster'))]},
        {'Notebooks': ['nbs/index.ipynb', *rooms, {'Appendix': notebooks('nbs/appendix')}, {'Tables': notebooks('nbs/tables')}]},
        {'API': ['api/index.md', *({m: f'api/{m}.md'} for m in modules())]},
        {'Reports': ['reports/index.md', 'reports/benchmarks/mining.md']},
        {'Project': ['contributing.md', 'dependencies.md', 'changelog.md']}]
    return config

@event_priority(100)  # before mkdocs-jupyter, which wraps the notebooks
def on_files(files, config):
    def add(path): files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in notebooks() + notebooks('nbs/appendix') + notebooks('nbs/tables'): add(path)
    for name in ('mining.md', 'mining.png'): add(f'reports/benchmarks/{name}')
    for path in report_files():
        if path.suffix in ('.html', '.png'): add(path.relative_to(ROOT).as_posix())
    for path, text in generated().items(): files.append(File.generated(config, path, content=text))
    return files

def report_files() -> list[Path]: return [p for r in REPORTS for p in (ROOT/'reports'/r).rglob('*') if p.is_file()]

# --- links ---

def on_page_markdown(text, page, config, files):
    "Files of docs/ lie one folder deeper in the repository than on the site; their links are those of the repository."
    return text.replace('](../../', '](../') if page.file.src_uri.startswith('howto/') else text

# --- what a notebook looks like as a page ---

FOREIGN = re.compile('http|src=|mathjax', re.I)  # scripts that fetch, and MathJax: formulas need none
STYLES = {}  # the style sheets of notebooks, which every page has in it: kept once

def on_page_content(content, page, config, files):
    if page.file.src_uri.startswith('api/'): return formulas(content)
    if not page.file.src_uri.endswith('.ipynb'): return content
    content = re.sub(r'<!-- [^>]*mathjax[^>]* -->', '', content, flags=re.I)
    content = re.sub(r'<script[^>]*>.*?</script>', lambda m: '' if FOREIGN.search(m[0]) else m[0], content, flags=re.S)
    content = re.sub(r'<style[^>]*>(.*?)</style>', lambda m: STYLES.setdefault(m[1], '') and '', content, flags=re.S)
    content = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', '', content)
    content = headings(formulas(content), page)
    sheet = posixpath.relpath('assets/notebook.css', posixpath.dirname(page.file.src_uri))
    return f'<link rel="stylesheet" href="{sheet}">' + notebook_links(content, page, files)

KEEP = r'<(pre|code|script)\b.*?</\1>|<div[^>]*clipboard-copy-txt.*?</div>'

def formulas(content) -> str:
    "$formulas$ as MathML, which browsers draw without any script; code is left as it is."
    def draw(m):
        if m[2] is None and m[3] is None: return m[0]
        return convert(html.unescape(m[2] or m[3]).strip(), display='block' if m[2] else 'inline')
    return re.sub(KEEP + r'|\$\$(.+?)\$\$|\$([^$]+?)\$', draw, content, flags=re.S)

def headings(content, page) -> str:
    "Headings with an id each, and the page's table of contents made from them."
    tokens, ids = [], set()
    def name(m):
        text = re.sub('<[^>]+>', '', m[3]).strip()
        ident = re.sub(r'[^a-z0-9]+', '-', html.unescape(text).lower()).strip('-') or 'section'
        while ident in ids: ident += '-'
        ids.add(ident)
        tokens.append({'level': int(m[1]), 'id': ident, 'name': text, 'children': []})
        return f'<h{m[1]} id="{ident}">{m[3]}</h{m[1]}>'
    content = re.sub(r'<h([1-3])( id="[^"]*")>(.*?)</h\1>', name, content, flags=re.S)
    page.toc = get_toc(nested(tokens))
    return content

def nested(tokens) -> list:
    "Each heading within the last one above it that is larger."
    roots, path = [], []
    for t in tokens:
        while path and path[-1]['level'] >= t['level']: path.pop()
        (path[-1]['children'] if path else roots).append(t)
        path.append(t)
    return roots

def notebook_links(content, page, files) -> str:
    "Links from notebook to notebook, as links from page to page."
    def link(m):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), m[1]))
        file = files.get_file_from_path(target)
        return f'href="{file.url_relative_to(page.file)}{m[2]}"' if file else m[0]
    return re.sub(r'href="([^":#]+\.(?:ipynb|md))(#[^"]*)?"', lambda m: link(m) if m[2] else link(re.match(r'href="([^"]+?)()"', m[0])), content)

def on_post_build(config):
    (Path(config.site_dir)/'assets/notebook.css').write_text('\n'.join(STYLES))
    for path in report_files():
        copy = Path(config.site_dir)/path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for folder in (Path(config.site_dir)/'reports').glob('*/notebooks'): (folder/'index.html').write_text(listing(folder))

def listing(folder) -> str:
    "A page for a folder that a report links to."
    names = sorted(p.name for p in folder.iterdir() if p.name != 'index.html')
    return '<!doctype html><meta charset="utf-8"><title>Executed notebooks</title>' + ''.join(f'<p><a href="{n}">{n}</a></p>' for n in names)
