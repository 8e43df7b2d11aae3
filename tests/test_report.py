"The report: its files as written by the command, and its page in a browser."
import html, json, re, shutil, subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cmlf.appendix.page import read_records, view_page
from cmlf.core import write_json
from cmlf.report import write_index
from command import ROOT, chromium, cmlf

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "The smoke report, written by the command; the notebooks share its runs."
    out = tmp_path_factory.mktemp('report')
    done = cmlf('reproduce', '--profile', 'smoke', '--out', out)
    assert done.returncode == 0, done.stderr
    assert 'Table III' in done.stdout and str(out/'index.html') in done.stdout
    return out

def test_the_report_is_complete(report):
    for n in (1, 2, 3):
        for ending in ('md', 'csv', 'tex'): assert (report/f'table{n}.{ending}').stat().st_size > 100
        assert 'Verdict' in (report/f'claims{n}.md').read_text() and len(pd.read_csv(report/f'claims{n}.csv')) >= 4
        assert (report/'notebooks'/f'table{n}.ipynb').exists()
    origin = json.loads((report/'provenance.json').read_text())
    assert {'commit', 'versions', 'seeds', 'corpus', 'machine', 'runs'} <= set(origin)
    assert all(r['minutes'] > 0 for r in origin['runs'])

def test_tables_agree_where_they_share_runs(report):
    one, two, three = (pd.read_csv(report/f'table{n}.csv') for n in (1, 2, 3))
    columns = ['t2a_r1', 't2a_r10', 'a2t_r1', 'a2t_r10', 'runs']
    chm = one[one.chm == 'yes'][columns].reset_index(drop=True)
    assert chm.equals(two[two.stage == 3][columns].reset_index(drop=True))
    middle = three.groupby('audio_encoder', sort=False).nth(1)[columns].reset_index(drop=True)
    assert chm.equals(middle)

def test_parameters_reached_the_notebook(tmp_path):
    "If papermill ignored the parameters, another setting would silently give the default run."
    done = cmlf('reproduce', '--profile', 'smoke', '--tables', '2', '--set', 'tau=0.2', '--only', '*scratch*', '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path/'table2.json').read_text())
    assert record['in_force']['optimiser']['tau'] == 0.2
    assert all(r['settings'].get('tau', 0.2) == 0.2 for r in record['runs'].values())

def test_check_finds_an_edited_cell(report, tmp_path):
    assert cmlf('reproduce', '--profile', 'smoke', '--check', '--out', report).returncode == 0
    edited = tmp_path/'edited'
    shutil.copytree(report, edited)
    table = pd.read_csv(edited/'table1.csv')
    row = int(np.flatnonzero(table.t2a_r1.notna())[0])
    table.loc[row, 't2a_r1'] += 5
    table.to_csv(edited/'table1.csv', index=False)
    done = cmlf('reproduce', '--profile', 'smoke', '--check', '--out', edited)
    assert done.returncode == 2 and f'edited table1.csv row {row + 1} (CE) t2a_r1: ' in done.stdout and 'from ranks/ce-b' in done.stdout

def test_a_report_completed_from_ranks_keeps_queries_and_batches(report, tmp_path):
    "Another machine has the ranks alone, and these need embeddings."
    copied = shutil.copytree(report, tmp_path/'copied')
    done = cmlf('reproduce', '--profile', 'smoke', '--tables', '1,2', '--only', 'nothing', '--ranks', report/'ranks',
                '--runs', tmp_path/'runs', '--out', copied)
    assert done.returncode == 0 and not list((tmp_path/'runs').rglob('run.json')), done.stderr
    old, new = (read_records(folder) for folder in (report, copied))
    assert len(old[1]['cards']) == 6 and new[1]['cards'] == old[1]['cards']
    files = [sorted(f['file'] for f in records[2]['figures']) for records in (old, new)]
    assert 'figures/batches.png' in files[0] and files[0] == files[1]
    assert 'only the ranks are here' in (copied/'notebooks'/'table1.ipynb').read_text()
    assert 'The best queries' in (copied/'index.html').read_text()

# --- the page

def committed_report(profile, tmp_path) -> Path:
    "A copy of a committed report, without sounds of recordings, which are not committed."
    ignored = shutil.ignore_patterns('sounds') if profile == 'field' else None
    return shutil.copytree(ROOT/'reports'/profile, tmp_path/profile, ignore=ignored)

def files_of(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

@pytest.mark.parametrize('profile', ['mini', 'field'])
def test_a_committed_page_can_be_written_again_from_its_files(profile, tmp_path):
    "Writing the page again from its records changes no file."
    folder = committed_report(profile, tmp_path)
    before = files_of(folder)
    write_index(folder)
    assert files_of(folder) == before
    figures = [f['file'] for r in read_records(folder).values() for f in r['figures']]
    assert len(figures) == len(set(figures)), 'two tables write one file'

def test_a_page_without_intervals_and_tests_has_warnings(tmp_path):
    folder = committed_report('mini', tmp_path)
    for n in (1, 2, 3):
        frame = pd.read_csv(folder/f'table{n}.csv')
        frame.drop(columns=[c for c in frame if c.endswith(('_low', '_high', '_sd'))]).to_csv(folder/f'table{n}.csv', index=False)
        record = json.loads((folder/f'table{n}.json').read_text())
        write_json(folder/f'table{n}.json', record | dict(claims=None, asked=record['asked'] | dict(seeds=1)))
    view = view_page(folder, read_records(folder))
    assert 'no intervals' in view['warnings'][0] and 'No claim was tested' in view['warnings'][1]
    assert not view['glance'] and not any(t['tested'] for p in view['parts'] for t in p['tables'])

def test_the_page_loads_no_other_files(report):
    page = (report/'index.html').read_text()
    sources = re.findall(r'(?:src|href|url\()="?([^" )]+)', page)
    assert sources and not [s for s in sources if not s.startswith(('data:', '#')) and not (report/s).exists()]
    assert '<script' not in page and '@import' not in page

# --- in a browser

MARKUP = '<script>document.title = "run"</script> "quoted" & \'more\''

MEASURE = """
<body>IFRAMES<pre id="found"></pre><script>
addEventListener('load', () => {
  const seen = e => e.checkVisibility()
  found.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(f => {
    const d = f.contentDocument, links = [...d.querySelectorAll('nav a')].filter(seen)
    const bar = d.querySelector('details.bar'), closed = links.length
    if (seen(bar)) { bar.open = true; links.push(...bar.querySelectorAll('a')) }
    return {inner: f.contentWindow.innerWidth, wide: d.documentElement.scrollWidth, closed, links: links.length,
            broken: links.filter(a => !d.getElementById(a.hash.slice(1))).length, title: d.title,
            captions: [...d.querySelectorAll('figcaption, h4')].map(e => e.textContent),
            text: parseFloat(f.contentWindow.getComputedStyle(d.querySelector('td')).fontSize)}
  }))
})
</script></body>
"""

@pytest.fixture
def browser(tmp_path):
    "A function that opens a page in Chromium with some flags and returns the output."
    command = [*chromium(tmp_path/'profile'), '--allow-file-access-from-files']
    return lambda path, *more: subprocess.run([*command, *more, path.as_uri()], capture_output=True, text=True,
                                              timeout=120, check=True).stdout

@pytest.fixture
def measured(report, tmp_path, browser):
    "Measurements of the page in windows of 1400 and 390 pixels, with texts that contain markup."
    folder = shutil.copytree(report, tmp_path/'report')
    record = json.loads((folder/'table1.json').read_text())
    record['figures'][0]['caption'] = record['cards'][0]['query'] = MARKUP
    write_json(folder/'table1.json', record)
    write_index(folder)
    frames = ''.join(f'<iframe src="index.html" width="{w}" height="900" style="border:0"></iframe>' for w in (1400, 390))
    (folder/'measure.html').write_text('<!doctype html>' + MEASURE.replace('IFRAMES', frames))
    dom = browser(folder/'measure.html', '--window-size=2000,1000', '--dump-dom')
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S).group(1)))

def test_wide_and_narrow_windows(measured):
    "The page is not wider than its window; wide tables scroll inside their box."
    assert [m['inner'] for m in measured] == [1400, 390]
    for m in measured: assert m['wide'] <= m['inner'] and m['text'] >= 12
    wide, narrow = measured
    assert wide['closed'] == wide['links'] >= 8 and narrow['closed'] == 0 and narrow['links'] == wide['links']
    assert wide['broken'] == narrow['broken'] == 0

def test_texts_are_shown_literally(measured):
    for m in measured: assert MARKUP in m['captions'] and f'“{MARKUP}”' in m['captions'] and m['title'].startswith('3CMLF on')

def test_the_page_in_a_browser(report, tmp_path, browser):
    page, shot = report/'index.html', tmp_path/'page.png'
    dom = browser(page, '--dump-dom')
    assert dom.count('<h2>Table') == 3 and dom.count('data:audio/mpeg') >= 6
    browser(page, '--window-size=1200,3000', f'--screenshot={shot}')
    import matplotlib.image
    assert matplotlib.image.imread(shot)[..., :3].std() > 0.05   # the picture is not blank
