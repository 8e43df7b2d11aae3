"The command line as a person or a script meets it, and the report as a browser shows it."
import json, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent

def cmlf(*arguments, **env):
    "Run the command in a process of its own."
    return subprocess.run([sys.executable, '-c', 'from cmlf.reproduce import main; main()', *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, **env}, timeout=600)

def assert_refused(done, *words):
    "Exactly one line on stderr that holds `words`, and exit code 2."
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and 'Traceback' not in done.stderr
    for word in words: assert word in lines[0]

@pytest.mark.parametrize('arguments, words', [
    (['reproduce', '--profile', 'minni'], ['minni', "did you mean 'mini'"]),
    (['reproduce', '--set', 'epoch=6'], ["'epoch'", "'epochs'"]),
    (['reproduce', '--set', 'epochs=six'], ['epochs', 'whole number']),
    (['reproduce', '--tables', '1,7'], ['7', '1, 2, 3']),
    (['reproduce', '--tables', 'one'], ['one']),
    (['reproduce', '--seeds', '0'], ['seeds']),
    (['reproduce', '--profile', 'field', '--events', '/no/such/folder'], ['/no/such/folder']),
    (['reproduce', '--profile', 'audiocaps'], ['--data']),
    (['reproduse'], ['reproduse']),
    (['reproduce', '--profle', 'mini'], ['--profle']),
])
def test_bad_input_is_one_line(arguments, words, tmp_path):
    assert_refused(cmlf(*arguments, CMLF_RUNS=str(tmp_path)), *words)

def test_field_without_recordings_says_how(tmp_path):
    assert_refused(cmlf('reproduce', '--profile', 'field', CMLF_RUNS=str(tmp_path), CMLF_ESC_DIR=''), 'CMLF_ESC_DIR')

def test_an_empty_folder_of_recordings_is_named(tmp_path):
    assert_refused(cmlf('reproduce', '--profile', 'field', '--events', tmp_path), str(tmp_path))

def test_help_of_every_command():
    for command in ('reproduce', 'data'): assert cmlf(command, '--help').returncode == 0

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "The smoke report, made through the command; runs are shared with the notebooks' own tests."
    out = tmp_path_factory.mktemp('report')
    done = cmlf('reproduce', '--profile', 'smoke', '--out', out)
    assert done.returncode == 0, done.stderr
    assert 'Table III' in done.stdout and str(out/'index.html') in done.stdout
    return out

def test_the_report_is_complete(report):
    for n in (1, 2, 3):
        for ending in ('md', 'csv', 'tex'): assert (report/f'table{n}.{ending}').stat().st_size > 100
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
    "papermill's worst trap: a sweep of identical runs. Two settings must give two runs."
    done = cmlf('reproduce', '--profile', 'smoke', '--tables', '2', '--set', 'tau=0.2', '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path/'table2.json').read_text())
    assert record['in_force']['tau'] == 0.2
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
    assert done.returncode == 1 and f'table1.csv row {row + 1} t2a_r1' in done.stdout

def test_data_is_the_same_in_every_process(tmp_path):
    hashes = [json.loads(cmlf('data', '--profile', 'smoke', '--json', PYTHONHASHSEED=s).stdout)['hash'] for s in ('1', '2')]
    assert hashes[0] == hashes[1]

def test_a_corpus_written_out_can_be_read_back(tmp_path):
    from cmlf.data import load_corpus
    done = cmlf('data', '--profile', 'smoke', '--out', tmp_path/'corpus', '--json')
    facts = json.loads(done.stdout)
    again = load_corpus(tmp_path/'corpus'/'manifest.csv', 2.0)
    assert len(again.split('test')) == facts['test']['clips'] and len(again.split('test').captions) == facts['test']['captions']

def test_the_page_in_a_browser(report, tmp_path):
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium is installed')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-sync', f'--user-data-dir={tmp_path/"profile"}', '--window-size=1200,3000']
    page = (report/'index.html').as_uri()
    dom = subprocess.run([chromium, *flags, '--dump-dom', page], capture_output=True, text=True, timeout=120).stdout
    assert dom.count('<h2>Table') == 3 and dom.count('data:audio/mpeg') >= 6
    shot = tmp_path/'page.png'
    subprocess.run([chromium, *flags, f'--screenshot={shot}', page], capture_output=True, timeout=120, check=True)
    import matplotlib.image
    assert matplotlib.image.imread(shot)[..., :3].std() > 0.05   # a page, not a blank
