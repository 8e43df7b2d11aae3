"Notebooks are committed with outputs, which `make notebooks` writes. These tests find outputs that are missing, outdated or too large."
import base64, re, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import notebooks

# --- what is committed ---

@pytest.mark.parametrize('path', notebooks.pages(), ids=lambda p: p.relative_to(notebooks.NBS).as_posix())
def test_outputs_of_a_page(path): assert notebooks.faults(path) == []

def test_all_pages_together_are_small(): assert notebooks.total_faults() == []

def test_cleaning_keeps_what_was_executed():
    ini = (ROOT/'settings.ini').read_text()
    assert notebooks.KEPT in re.search(r'^allowed_metadata_keys = (.*)', ini, re.M)[1].split()
    assert 'clean_ids = True' in ini and 'clear_all = True' not in ini

# --- executing ---

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A function that writes the only notebook of a temporary project."
    (tmp_path/'nbs').mkdir()
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.setattr(notebooks, 'ROOT', tmp_path)
    monkeypatch.setattr(notebooks, 'NBS', tmp_path/'nbs')
    monkeypatch.setenv('IN_TEST', '1')
    monkeypatch.setenv('CMLF_ESC_DIR', str(tmp_path))
    def write(*sources, **metadata):
        kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
        nb = new_notebook(cells=[new_code_cell(s) if s[:2] != '# ' else new_markdown_cell(s) for s in sources],
                          metadata={'kernelspec': kernel} | metadata)
        path = tmp_path/'nbs/00_page.ipynb'
        nbformat.write(nb, path)
        return path
    return write

def outputs(path): return [''.join(str(o.get('text', '')) or str(o.data['text/plain']) for o in c.outputs)
                           for c in notebooks.code_cells(notebooks.read(path))]

def test_outputs_do_not_depend_on_the_machine(project, tmp_path):
    path = project('# Title', 'import os, sys, tempfile', "print('bar', file=sys.stderr); print('10 %\\r20 %\\rdone')", 'object()',
                   "print(os.getcwd(), os.environ.get('IN_TEST'), os.environ.get('CMLF_ESC_DIR'), os.environ['OMP_NUM_THREADS'])",
                   'tempfile.gettempdir() + "/tmpab_c1/x"', '#| eval: false\n1/0')
    line = notebooks.execute(path)
    assert '4 outputs' in line and '1 cells are marked' in line
    assert outputs(path) == ['', 'done\n', '<object>', "./nbs None None 1\n", "'/tmp/…/x'", '']
    assert notebooks.faults(path) == [] and not notebooks.is_stale(notebooks.read(path))
    nb = notebooks.read(path)
    assert all(c.execution_count is None for c in notebooks.code_cells(nb))
    subprocess.run([Path(sys.executable).parent/'nbdev_clean', '--fname', path], cwd=tmp_path, check=True)
    assert notebooks.read(path) == nb  # cleaning changes nothing more

def test_executing_again_changes_no_byte(project):
    path = project('import matplotlib.pyplot as plt', 'plt.plot([1, 2]); plt.show()', 'lambda: 0')
    notebooks.execute(path)
    first = path.read_bytes()
    notebooks.execute(path)
    assert path.read_bytes() == first

def test_an_error_leaves_the_page_as_it_was(project, capsys):
    path = project('1 + 1', '1/0')
    before = path.read_bytes()
    assert notebooks.execute_all([path], 1, 0) == 1
    assert path.read_bytes() == before and 'ZeroDivisionError' in capsys.readouterr().err

def test_an_edit_while_executing_is_not_lost(project, capsys):
    path = project('from pathlib import Path', "p = Path('00_page.ipynb'); p.write_text(p.read_text().replace('edit' + 'ed', 'mine'))", '# edited')
    assert notebooks.execute_all([path], 1, 0) == 1
    assert '# mine' in path.read_text() and 'was edited while' in capsys.readouterr().err

# --- the check ---

def executed(project, *sources):
    path = project(*sources)
    notebooks.execute(path)
    return path, notebooks.read(path)

def test_changed_code_makes_a_page_stale_but_changed_prose_does_not(project):
    path, nb = executed(project, '# Title', '1 + 1', '2')
    nb.cells[0].source = '# Another title'
    nbformat.write(nb, path)
    assert notebooks.faults(path) == []
    nb.cells[1].source = '1 + 2'
    nbformat.write(nb, path)
    assert 'its code changed' in notebooks.faults(path)[0] and notebooks.is_stale(nb)
    nb.cells[1].source, nb.cells[2].source = '2', '1 + 1'
    assert notebooks.is_stale(nb)  # order counts

def test_missing_outputs_are_found(project):
    path, nb = executed(project, '1 + 1', '2')
    nb.cells[0].outputs = []
    nbformat.write(nb, path)
    assert '2 cells had outputs' in notebooks.faults(path)[0]
    path = project('x = 1')
    notebooks.execute(path)
    assert 'shows nothing' in notebooks.faults(path)[0]
    del nb.metadata[notebooks.KEPT]
    nbformat.write(nb, path)
    assert 'never executed' in notebooks.faults(path)[0]

def data(**kinds): return new_output('display_data', data={k.replace('_', '/'): v for k, v in kinds.items()})

def base64_of(size): return base64.b64encode(b'x' * size).decode()

@pytest.mark.parametrize('output, fault', [
    (new_output('error', ename='ValueError', evalue='wrong', traceback=[]), 'ended in ValueError: wrong'),
    (new_output('stream', name='stderr', text='50 %'), 'stderr'),
    (data(image_png=base64_of(80_100)), 'a picture of 80 kB'), (data(audio_mpeg=base64_of(26_000)), 'a sound of 26 kB'),
    (data(text_html=f'<audio src="data:audio/mpeg;base64,{base64_of(26_000)}">'), 'a sound of 26 kB'),
    (data(text_html=f'<img src="data:image/png;base64,{base64_of(90_000)}">'), 'a picture of 90 kB'),
    (data(text_plain='/home/someone/data'), 'a path of one machine, /home/someone'),
    (data(text_plain=r'C:\Users\me\x'), 'a path of one machine'), (data(text_plain='/root/.cache'), 'a path of one machine'),
    (data(text_html='<b>/Users/someone</b>'), 'a path of one machine'),
    (data(text_plain='/x/lib/site-packages/torch'), 'a path of one machine'),
    (data(text_plain=f'{notebooks.ROOT}/runs'), 'a path of one machine'),
    (data(text_plain='<function f at 0x7f0011223344>'), 'an address')])
def test_what_must_not_be_committed_is_named(output, fault):
    found = notebooks.output_faults(output)
    assert len(found) == 1 and fault in found[0]

@pytest.mark.parametrize('output', [data(image_png=base64_of(79_000)), data(text_plain='R@1 30.5, 0x10'), new_output('stream', text='/tmp/…'),
                                    data(text_html=f'<audio src="data:audio/mpeg;base64,{base64_of(24_000)}">')])
def test_what_may_be_committed(output): assert notebooks.output_faults(output) == []

def test_a_large_picture_gets_fewer_colours():
    import io
    import numpy as np
    from PIL import Image
    out = io.BytesIO()
    ramp = np.add.outer(np.arange(400), np.arange(400))
    Image.fromarray(np.stack([ramp % 256, ramp * 3 % 256, ramp // 4 % 256], -1).astype('uint8')).save(out, 'png', compress_level=0)
    png = base64.b64encode(out.getvalue()).decode()
    small = notebooks.fewer_colours(png)
    assert len(small) < len(png) / 2 and Image.open(io.BytesIO(base64.b64decode(small))).size == (400, 400)

def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match='no_such_page'): notebooks.pages(['no_such_page'])
