"The site: it builds without warnings, all links work, it loads no external files, and its search box works."
import contextlib, functools, http.server, importlib.util, os, re, subprocess, sys, threading

import pytest

from browser import browser
from command import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import links
import notebooks

# --- the link checker ---

def small_site(folder, **pages):
    for name, text in pages.items(): (folder/f'{name}.html').write_text(text)
    return folder

def test_working_links(tmp_path):
    site = small_site(tmp_path, index='<h1 id="top"></h1><a href="two.html#here">x</a><a href="#top">x</a><a href="https://x.org">x</a>',
                      two='<p id="here"></p><img src="data:image/png;base64,AA=="><a href="index.html">x</a>')
    assert links.faults(site) == []

@pytest.mark.parametrize('page, fault', [
    ('<a href="three.html">x</a>', 'no such file'), ('<a href="two.html#there">x</a>', 'no such anchor'),
    ('<a href="#there">x</a>', 'no such anchor'), ('<img src="a.png">', 'no such file'),
    ('<script src="https://cdn.example.org/a.js"></script>', 'loads https://cdn.example.org/a.js'),
    ('<link rel="stylesheet" href="//fonts.example.org/f.css">', 'loads //fonts'),
    ('<style>@import url("https://fonts.example.org/f.css");</style>', 'loads https://fonts')])
def test_a_broken_link_is_named(tmp_path, page, fault):
    found = links.faults(small_site(tmp_path, index=page, two='<p id="here"></p>'))
    assert len(found) == 1 and found[0].startswith('index.html: ') and fault in found[0]

# --- the site ---

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    for package in ('mkdocs', 'material', 'mkdocs_jupyter', 'mkdocstrings', 'latex2mathml'):
        if not importlib.util.find_spec(package): pytest.skip(f'{package} is not installed; make .venv/site')
    if os.environ.get('CMLF_SITE'): return ROOT/os.environ['CMLF_SITE'] # it has just been built
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', folder], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

def test_links(site): assert links.faults(site) == []

def test_every_module_notebook_and_report_has_a_page(site):
    for path in notebooks.pages(): assert (site/path.relative_to(ROOT)).with_suffix('.html').is_file(), path
    for path in (ROOT/'cmlf').rglob('[a-z]*.py'):
        assert (site/'api'/('.'.join(path.relative_to(ROOT/'cmlf').with_suffix('').parts) + '.html')).is_file(), path
    for name in ('mini', 'field'): assert '<table' in (site/f'reports/{name}/index.html').read_text()

def test_formulas_are_drawn_without_a_script(site):
    page = (site/'nbs/09_loss.html').read_text()
    assert page.count('<math') > 20 and 'mathjax' not in page.lower()
    prose = re.sub(r'<(pre|code)\b.*?</\1>|<div[^>]*clipboard-copy-txt.*?</div>', '', page, flags=re.S)
    assert '$$' not in prose and r'\frac' not in prose

def test_comments_beside_arguments_are_documentation(site):
    page = (site/'api/loss.html').read_text()
    assert 'temperature' in page and 'embeddings of the clips' in page

# --- the search box, in a browser ---

@contextlib.contextmanager
def served(folder):
    "Serve a folder on this machine; gives the address."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown(); server.server_close()

@pytest.fixture
def tab(tmp_path):
    with browser(tmp_path/'profile') as tab: yield tab

def test_the_search_box_finds_pages(site, tab):
    with served(site) as address:
        tab.send('Network.enable')
        tab.send('Page.navigate', url=f'{address}/index.html?q=temperature')
        results = 'Array.from(document.querySelectorAll(".md-search-result__item a")).map(a => a.getAttribute("href")).join(" ")'
        assert 'nbs/09_loss.html' in tab.wait(results)
        tab.value('const q = document.querySelector(".md-search__input"); q.focus(); q.value = "ResNet38"; '
                  'q.dispatchEvent(new Event("keyup")); q.dispatchEvent(new Event("input", {bubbles: true}))')
        tab.wait(f'{results}.includes("08_encoders")')
        assert tab.asked and all(u.startswith((address, 'data:', 'blob:', 'about:')) for u in tab.asked)
