"""Notebooks that run by papermill and nbdev: each known trap is an error, or cannot happen. Never a table that looks right.

The names of the tests are those of the traps: what papermill 2.7 and nbdev 2.4 do by themselves."""
import base64, json, re, shutil, subprocess, sys, tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement

from cmlf import report
from cmlf.appendix import notebook_runs
from cmlf.appendix.notebook_runs import check_kernel, declared, hide_paths, read_notebook, run_notebook
from cmlf.core import CmlfError
from command import ROOT

@pytest.fixture
def write(tmp_path):
    "A function that writes a notebook; its first code cell holds the parameters."
    def write(*sources, tag='parameters', **metadata):
        nb = new_notebook(cells=[new_markdown_cell(s) if s[:1] == '#' else new_code_cell(s) for s in sources], metadata=metadata)
        if tag: next(c for c in nb.cells if c.cell_type == 'code').metadata['tags'] = [tag]
        nbformat.write(nb, tmp_path/'page.ipynb')
        return tmp_path/'page.ipynb'
    return write

@pytest.fixture
def failed(tmp_path):
    "A function that checks for one line when a notebook is refused or has failed; the line."
    def failed(path, words, **parameters):
        with pytest.raises(CmlfError, match=words) as e: run_notebook(path, tmp_path/'out'/'page.ipynb', parameters)
        assert '\n' not in str(e.value) and len(str(e.value)) < 900
        return str(e.value)
    return failed

@pytest.fixture
def refused(failed, tmp_path):
    "The same, and nothing was executed."
    def refused(path, words, **parameters):
        failed(path, words, **parameters)
        assert not (tmp_path/'out').exists()
    return refused

# --- papermill: before the run

def test_no_parameters_tag_so_the_defaults_win(write, refused):
    refused(write('lr = 1.', 'print(lr)', tag=''), 'no cell is tagged "parameters"', lr=5.)
    refused(write('lr = 1.', 'print(lr)', tag='parameter'), 'no cell is tagged "parameters"', lr=5.)

def test_no_parameters_tag_is_refused_without_parameters_too(write, refused): refused(write('1', tag=''), 'no cell is tagged')

def test_a_tag_of_a_markdown_cell_does_not_count(write, refused):
    nb = read_notebook(path := write('# Title', 'lr = 1.', tag=''))
    nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, path)
    refused(path, 'no cell is tagged', lr=5.)

def test_two_tagged_cells_so_the_second_wins(write, refused):
    nb = read_notebook(path := write('lr = 1.', 'lr = 2.'))
    nb.cells[1].metadata['tags'] = ['parameters']
    nbformat.write(nb, path)
    refused(path, '2 cells are tagged', lr=5.)

def test_a_parameter_that_is_set_again_so_the_later_one_wins(write, refused):
    refused(write('lr = 1.', '%pylab\nimport os', '!ls\nlr, a = 2., 3'), 'code cell 3 of 3 sets the parameter lr again, to 2.0', lr=5.)

def test_misspelt_parameter_is_only_warned_about(write, refused):
    refused(write('batch_size = 8', 'batch_size'), "'batchsize'; did you mean 'batch_size'", batchsize=16)

def test_annotations_with_none_are_unknown_to_papermill(write):
    path = write("x: None|str = None\ny: 'int' = 3\nfrom typing import Optional\nz: Optional[float] = None\nw: list[int] = []")
    assert declared(path) == dict(x=['NoneType', 'str'], y=['int'], z=['NoneType', 'float'], w=['int', 'list'])
    notebook_runs.check_parameters(path, dict(x='a', z=None, w=[1]))
    with pytest.raises(CmlfError, match='x=1 is a int'): notebook_runs.check_parameters(path, dict(x=1))

def test_tuple_assignments_are_not_seen_by_papermill(write, tmp_path):
    path = write("a, (b, c), *d = 1, (2, 3), 4\n[e, f] = 'x', 0.5", 'print(a, e, f)')
    assert set(declared(path)) >= {'a', 'e', 'f'} and declared(path)['f'] == ['float']
    run_notebook(path, tmp_path/'out.ipynb', dict(a=7, f=.25))
    assert read_notebook(tmp_path/'out.ipynb').cells[-1].outputs[0].text == '7 x 0.25\n'

@pytest.mark.parametrize('default, value', [
    ('True', 'false'), ('True', 0), ('[1]', '[1,2]'), ("'7'", 7), ('1', True), ('1', '1'), ('1', 1.), ('0.1', '1e-4'), ("'no'", False),
    ('0.1', True), ("''", None), ('dict(a=1)', Path('a')), ('{}', []), ('1', __import__('numpy').int64(3)), ('0.1', float('nan')), ('0.1', float('inf')),
    ('None', object()), ('[]', [Path('a')]), ('None', {1: 2})], ids=lambda v: repr(v).split(' at ')[0])
def test_types_are_what_yaml_and_the_command_line_make_of_them(write, refused, default, value):
    refused(write(f'x = {default}', 'x'), r'page.ipynb: x=', x=value)

def test_kernel_is_missing(write, refused, monkeypatch, tmp_path):
    monkeypatch.setattr('cmlf.appendix.notebook_runs.has_kernel', lambda: False)
    refused(write('x = 1'), 'no Jupyter kernel named python3; in this environment: pip install ipykernel', x=2)

@pytest.mark.parametrize('program, words', [('/usr/bin/env', 'not this Python'), ('/no/such/python3', 'does not exist')])
def test_kernel_of_another_python(program, words, tmp_path, monkeypatch):
    "A kernel that was installed for the user comes first, whatever it starts."
    kernel = tmp_path/'kernels'/'python3'
    kernel.mkdir(parents=True)
    (kernel/'kernel.json').write_text(json.dumps(dict(argv=[program, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name='x', language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
    with pytest.raises(CmlfError, match=words): check_kernel()
    (kernel/'kernel.json').write_text(json.dumps(dict(argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name='x', language='python')))
    check_kernel()

@pytest.mark.parametrize('text', ['', 'no json', '[]', '{}', '{"cells": 5, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_no_notebook(tmp_path, refused, text):
    (tmp_path/'page.ipynb').write_text(text)
    refused(tmp_path/'page.ipynb', 'page.ipynb: not readable as a notebook', x=1)
    refused(tmp_path/'none.ipynb', 'none.ipynb: not readable as a notebook .no such file', x=1)

def test_parameters_that_are_no_python(write, refused): refused(write('x = = 1'), 'the cell of parameters is not Python: line 1', x=1)

# --- papermill: the run

def test_failure_names_cell_section_stage_and_epoch(write, failed, tmp_path):
    line = failed(write('# Table\n\n## Setup', 'n = 1', '# Curves', "import sys\nprint('stage 2 (mined), epoch 3/4', file=sys.stderr)\n1/(n - 2)", 'n'),
                  r'code cell 2 of 3, in the section "Curves", after "stage 2 \(mined\), epoch 3/4", failed with ZeroDivisionError: division by zero', n=2)
    assert str(tmp_path/'out'/'page.ipynb') in line and (tmp_path/'out'/'page.ipynb').exists()

def test_sys_exit_0_counts_as_success(write, failed):
    failed(write('x = 1', '# The end?', 'import sys; sys.exit(0)', "print('table')"), 'code cell 2 of 3, in the section "The end.", ended in SystemExit: 0', x=2)

def test_a_dead_kernel_is_an_error_and_no_hang(write, failed):
    "What running out of memory looks like: the process is gone."
    failed(write('x = 1', '# Memory', "import os, sys\nprint('epoch 2/9', file=sys.stderr, flush=True)\nimport time; time.sleep(.5)\nos._exit(9)", 'x'),
           r'code cell 2 of 3, in the section "Memory".* failed with DeadKernelError', x=2)

def test_the_kernel_in_the_metadata_does_not_count_and_stderr_is_passed_on(write, tmp_path, capfd):
    "Another kernel's name, language and old outputs in the file; progress is shown while a cell runs."
    path = write('x = 1', "import sys; print('epoch', x, file=sys.stderr); sys.executable", kernelspec=dict(name='ir', display_name='R', language='R'))
    nb = read_notebook(path)
    nb.cells[1].outputs, nb.cells[1].execution_count = [new_output('stream', text='old')], 9
    nbformat.write(nb, path)
    run_notebook(path, tmp_path/'out.ipynb', dict(x=5))
    out = read_notebook(tmp_path/'out.ipynb').cells[-1]
    assert 'epoch 5' in capfd.readouterr().err and out.execution_count == 3 and 'old' not in json.dumps(out)
    assert eval_text(out) == repr(sys.executable)

def eval_text(cell): return next(o.data['text/plain'] for o in cell.outputs if 'data' in o)

def test_parameters_that_papermill_did_not_pass_on(write, failed, monkeypatch):
    "Whatever papermill does one day: the injected cell is compared with what was asked for."
    import papermill
    execute = papermill.execute_notebook
    monkeypatch.setattr(papermill, 'execute_notebook', lambda a, b, parameters, **kw: execute(a, b, dict(parameters, x=1), **kw))
    failed(write('x = 1\ny = 2'), 'ran with other parameters than were asked for: x', x=2, y=3)

def test_an_output_of_an_earlier_run_is_not_taken_for_this_one(write, tmp_path, monkeypatch):
    import papermill
    def fail(*_, **__): raise RuntimeError('Kernel did not respond')
    monkeypatch.setattr(papermill, 'execute_notebook', fail)
    (tmp_path/'out.ipynb').write_bytes(write('x = 1').read_bytes())
    with pytest.raises(CmlfError, match='not executed, RuntimeError: Kernel did not respond'): run_notebook(write('x = 1'), tmp_path/'out.ipynb', dict(x=2))
    assert not (tmp_path/'out.ipynb').exists()

def test_a_failed_notebook_changes_no_table(write, tmp_path, monkeypatch):
    "It had written its table before the cell that failed."
    path = write("profile = seeds = settings = out = runs = events = data = only = ranks = ''".replace(' seeds =', '') + '\nseeds = 1', '# Tests',
                 "from pathlib import Path\nPath(out).mkdir(exist_ok=True)\n(Path(out)/'table1.csv').write_text('new')", 'raise ValueError(out)')
    (out := tmp_path/'report').mkdir()
    (out/'table1.csv').write_text('old')
    monkeypatch.setattr(report, 'notebook_of', lambda n: path)
    asked = dict.fromkeys(('settings', 'runs', 'events', 'data', 'only', 'ranks'), '') | dict(profile='smoke', seeds=1, out=str(out))
    with pytest.raises(CmlfError, match='code cell 3 of 3, in the section "Tests", failed with ValueError') as e: report._make_table(1, asked)
    assert (out/'table1.csv').read_text() == 'old' and [p.name for p in out.iterdir() if p.suffix] == ['table1.csv']
    assert Path(re.search(r'see (.*)\)', str(e.value))[1]).exists()

@pytest.mark.parametrize('what, words', [('has_kernel', 'no Jupyter kernel'), ('declared', 'unknown parameter')])
def test_what_can_be_refused_is_refused_before_training(what, words, tmp_path, monkeypatch):
    "Hours of training come before the notebooks."
    monkeypatch.setattr(notebook_runs, what, lambda *_: {})
    monkeypatch.setattr('cmlf.experiments.Experiment.train_all', lambda *_: pytest.fail('it trains'))
    with pytest.raises(CmlfError, match=words): report.reproduce('smoke', [1], runs=tmp_path/'runs', out=tmp_path/'report')

# --- nbdev

def test_nbdev_clean_deletes_the_parameters_tag(tmp_path, refused):
    "With our settings it does not; without them, the notebook is refused."
    nbs = tmp_path/'nbs'
    nbs.mkdir()
    shutil.copy(ROOT/'nbs'/'tables'/'table1.ipynb', nbs)
    clean = [Path(sys.executable).parent/'nbdev_clean', '--fname', nbs/'table1.ipynb']
    settings = (ROOT/'settings.ini').read_text()
    (tmp_path/'settings.ini').write_text(settings)
    subprocess.run(clean, cwd=nbs, check=True, timeout=120)
    assert declared(nbs/'table1.ipynb') == declared(ROOT/'nbs'/'tables'/'table1.ipynb')
    (tmp_path/'settings.ini').write_text(settings.replace('allowed_cell_metadata_keys = tags', ''))
    subprocess.run(clean, cwd=nbs, check=True, timeout=120)
    refused(nbs/'table1.ipynb', 'no cell is tagged "parameters"', profile='mini')

def test_every_notebook_of_a_table_declares_what_it_is_given():
    for n in (1, 2, 3, 'claims'):
        asked = dict(profile='mini', settings='', seeds=1, events='', runs='', data='', out='', only='', ranks='')
        notebook_runs.check_parameters(report.notebook_of(n), asked)
        notebook_runs.check_kept(report.notebook_of(n), asked)

def test_nbdev_needs_both_pins():
    "nbdev 2 asks for neither, and breaks with execnb 0.2 as well as with fastcore 2."
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    wanted = {r.name: r.specifier for r in map(Requirement, project['dependencies'] + project['optional-dependencies']['dev'])}
    for name, below in dict(nbdev='3.0', execnb='0.2.0', fastcore='2.0').items():
        assert not wanted[name].contains(below) and wanted[name].contains(version(name)), name
    assert not wanted['execnb'].contains('0.1.15')  # errors before a cell ran were silent

def test_nbdev_3_renames_its_commands():
    "What Makefile and the checks call is there."
    scripts = {e.name for e in distribution('nbdev').entry_points if e.group == 'console_scripts'}
    used = set(re.findall(r'\bnbdev_\w+', (ROOT/'Makefile').read_text() + (ROOT/'.ci'/'run').read_text()))
    assert used and used <= scripts

def test_nbdev_replaces_a_pyproject_that_was_written_by_hand():
    from nbdev.config import get_config
    assert str(get_config(path=ROOT).update_pyproject) == 'False'

def test_nbdev_test_passes_if_no_file_matched():
    "It finds every page, so a pass is not a pass of nothing; and no flag lets a cell out."
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    found = {Path(p).resolve() for p in nbglob(ROOT/'nbs', as_path=True)}
    assert found == {p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts} and len(found) > 60
    flags = get_config(path=ROOT).tst_flags.split()  # a space between them: with | none would count
    assert len(flags) == 2
    cells = [c.source for p in found for c in nbformat.read(p, as_version=4).cells if c.cell_type == 'code']
    assert not [s for s in cells if re.search(rf'^#\|\s*({"|".join(flags)})\b', s, re.M)]

def test_nbdev_test_loads_torch_in_every_process():
    "One per core by default; here their number is given."
    assert re.search(r'nbdev_test --n_workers \d', (ROOT/'Makefile').read_text())

def test_nbdev_test_needs_no_kernel():
    "So a page can pass where papermill cannot run: the library asks for ipykernel itself."
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert 'ipykernel' in {Requirement(r).name for r in project['dependencies']}

# --- what others read

PNG = base64.b64encode(b'\x89PNG' + b'/home/me/data' * 9).decode()
HOME = '/home/me/dä"ta & <more>'

@pytest.fixture
def hidden(tmp_path):
    "A function that hides folders in a notebook with some outputs; the notebook before and after."
    def hidden(outputs, folders, source='x = 1', tags=(), **metadata):
        cell = new_code_cell(source, outputs=outputs, execution_count=3, metadata=dict(tags=list(tags)))
        nbformat.write(new_notebook(cells=[cell], metadata=metadata), path := tmp_path/'page.ipynb')
        before = read_notebook(path)
        hide_paths(path, folders)
        json.loads(path.read_text())
        return before.cells[0], (nb := read_notebook(path)).cells[0], nb.metadata
    return hidden

@pytest.mark.parametrize('text, want', [
    ('/home/me/data', 'data'), ('/home/me/data/a.npy', 'data/a.npy'), ("'/home/me/data'", "'data'"), ('words=/home/me/data/w.txt;', 'words=data/w.txt;'),
    ('file:///home/me/data/a', 'file://data/a'), ('in /home/me/data. Then', 'in data. Then'), ('/home/me/data:/home/me/data', 'data:data'),
    *((same, same) for same in ('/home/me/data2', '/home/me/data-2', '/home/me/data_2', '/home/me/data.old', '/mnt/home/me/data', 'x/home/me/data', '../home/me/data',
                                '/home/me', 'home/me/data', 'data', '/HOME/me/data', '/home/me/datä'))])
def test_only_whole_paths_are_hidden(hidden, text, want):
    _, cell, _ = hidden([new_output('stream', text=text)], ['/home/me/data'])
    assert cell.outputs[0].text == want

def test_pictures_numbers_and_code_stay(hidden):
    outputs = [new_output('display_data', data={'image/png': PNG, 'text/plain': 'at /home/me/data', 'application/json': {'n': 1.5, 'at': ['/home/me/data', None, True]}}),
               new_output('display_data', data={'text/html': f'<p>/home/me/data</p><img src="data:image/jpeg;base64,/9j/home/me/data/{PNG}">'}),
               new_output('error', ename='E', evalue='/home/me/data', traceback=['\x1b[31m/home/me/data\x1b[0m', '/home/me/data']),
               new_output('stream', text='30.5 /home/me/data 0.1')]
    before, cell, meta = hidden(outputs, ['/home/me/data', '/9j'], 'open("/home/me/data")', lr=1e-4, papermill=dict(parameters=dict(data='/home/me/data', n=[3, 0.5])))
    assert cell.source == before.source and cell.execution_count == 3 and cell.id == before.id
    a, b, c, d = cell.outputs
    assert a.data == {'image/png': PNG, 'text/plain': 'at data', 'application/json': {'n': 1.5, 'at': ['data', None, True]}}
    assert b.data['text/html'] == f'<p>data</p><img src="data:image/jpeg;base64,/9j/home/me/data/{PNG}">'
    assert (c.evalue, c.traceback) == ('data', ['\x1b[31mdata\x1b[0m', 'data']) and d.text == '30.5 data 0.1'
    assert meta.papermill.parameters == dict(data='data', n=[3, 0.5]) and meta.lr == 1e-4

def test_a_path_is_hidden_in_every_way_of_writing_it(write, tmp_path):
    "papermill writes ä as \\xe4, HTML writes & as &amp;, JSON writes quotes with a backslash."
    path = write("data = ''", 'import html, json, urllib.parse\nfrom IPython.display import HTML\nprint(data, json.dumps([data], ensure_ascii=False))\nprint(urllib.parse.quote(data))\nHTML(html.escape(data))')
    run_notebook(path, tmp_path/'out.ipynb', dict(data=HOME))
    hide_paths(tmp_path/'out.ipynb', [HOME, str(tmp_path)])
    text = (tmp_path/'out.ipynb').read_text()
    assert 'home' not in text and '/me/' not in text and read_notebook(tmp_path/'out.ipynb').metadata.papermill.parameters.data == Path(HOME).name
    nb = read_notebook(tmp_path/'out.ipynb')
    scope = {}
    exec(next(c.source for c in nb.cells if 'injected-parameters' in c.metadata.get('tags', [])), scope)
    assert scope['data'] == Path(HOME).name  # still Python, and still the same text

def test_what_is_no_folder_of_a_machine_is_left(hidden):
    _, cell, _ = hidden([new_output('stream', text='/ data /home/me/x 1/2')], ['', '/', 'data', None])
    assert cell.outputs[0].text == '/ data /home/me/x 1/2'

def test_longer_paths_come_first_and_may_have_another_name(hidden):
    _, cell, _ = hidden([new_output('stream', text='/home/me/r/new/a /home/me/r/b /home/me/c')], {'/home/me': '~', '/home/me/r': '', '/home/me/r/new': 'mini'})
    assert cell.outputs[0].text == 'mini/a r/b ~/c'

def test_numbers_of_committed_notebooks_survive(tmp_path):
    "The notebooks of a report, with folders that are in no path of them but in many texts."
    for path in (ROOT/'reports'/'mini'/'notebooks').glob('*.ipynb'):
        shutil.copy(path, copy := tmp_path/path.name)
        hide_paths(copy, ['/30', '/a', '/R', '/svg', '/b', '/div'])
        assert read_notebook(copy) == read_notebook(path)
