"""Files and names of others: no pickle runs, nothing is unpacked, markup stays text, spreadsheets find no formulas.

What `cmlf serve` refuses is in test_web.py: other hosts and sites (test_only_this_machine_is_served, test_other_sites_are_refused),
large, long, broken and interrupted uploads (test_large_uploads_are_refused_early), paths outside its folder, and markup in a browser
(test_markup_stays_text). Damaged and hostile files of every kind are in test_bad_input.py."""
import ast, contextlib, io, pickle, re, shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from markdown_it import MarkdownIt

from browser import browser
from cmlf.appendix import bad_models, web
from cmlf.appendix.bad_input import Bomb
from cmlf.appendix.card import model_card
from cmlf.appendix.checkpoints import read_panns
from cmlf.appendix.corpus_tables import read_relevant_pairs
from cmlf.appendix.experts import load_expert, read_vectors
from cmlf.appendix.page import render, view_cards
from cmlf.appendix.probes import for_sheets
from cmlf.appendix.ranks import read_ranks
from cmlf.appendix.resume import Checkpoint, read_state, write_state
from cmlf.core import CmlfError, content_hash, file_hash, read_json, read_npy, write_json
from cmlf.encoders import DualEncoder, TextEncoder
from cmlf.features import FeatureStore
from cmlf.layouts import load_corpus
from cmlf.report import write_credits, write_index
from cmlf.runs import Run
from cmlf.search import Hit, Hits, SoundIndex
from cmlf.tables import write_table
from command import ROOT

# --- nothing that is read can run

SOURCES = sorted(p for folder in ('cmlf', 'tools', 'benchmarks') for p in (ROOT/folder).rglob('*.py') if p.name != '_modidx.py')
UNPICKLERS = {'pickle', 'cPickle', '_pickle', 'dill', 'joblib', 'cloudpickle', 'shelve', 'marshal'}
ARCHIVES = {'zipfile', 'tarfile', 'zipimport', 'py7zr', 'rarfile'}
READS_ZIPS = ROOT/'tools'/'audit.py'  # reads members, and unpacks none (test_dependencies.py: test_a_zip_is_read_and_not_unpacked)
MAKES_BOMBS = ROOT/'cmlf'/'appendix'/'bad_models.py'  # it writes a pickle that runs code, to show that it is refused

def faults(source) -> list:
    "Calls and imports in some code that run, or unpack, what is in a file."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or '']
            found += [f'import {n}' for n in names if n.split('.')[0] in UNPICKLERS | ARCHIVES]
        if not isinstance(node, ast.Call): continue
        call, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if call in ('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen') or call.endswith(('unpack_archive', 'extractall', 'read_pickle', 'gensim_load', 'KeyedVectors.load')):
            found.append(call)
        if call in ('torch.load', 'torch.serialization.load') and given.get('weights_only') != 'True': found.append(call)
        if call.startswith('yaml.') and call not in ('yaml.safe_load', 'yaml.safe_dump'): found.append(call)
        found += [f'{call}({k}={given[k]})' for k in ('allow_pickle', 'trust_remote_code', 'shell') if given.get(k, 'False') != 'False']
    return found

@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_code_runs_or_unpacks_what_is_in_a_file(path):
    "dask sends its own tasks as pickles, between processes of one user; the library opens none."
    known = {MAKES_BOMBS: ['import pickle'], READS_ZIPS: ['import zipfile']}
    assert faults(path.read_text()) == known.get(path, [])

def test_the_catalogue_of_bad_models_only_writes_pickles():
    used = {ast.unparse(n.func) for n in ast.walk(ast.parse(MAKES_BOMBS.read_text())) if isinstance(n, ast.Call)}
    assert {u for u in used if u.startswith('pickle.')} == {'pickle.dumps'}

@pytest.mark.parametrize('code', ['import pickle', 'from joblib import load', 'import zipfile', 'from tarfile import open', 'torch.load(p)', 'torch.load(p, weights_only=False)',
                                  'np.load(p, allow_pickle=True)', 'np.load(p, allow_pickle=x)', 'yaml.load(f)', 'eval(x)', 'exec(x)', 'shutil.unpack_archive(a, b)', 'z.extractall()',
                                  'pd.read_pickle(p)', 'KeyedVectors.load(p)', 'f(n, trust_remote_code=True)', 'run(c, shell=True)', 'os.system(c)'])
def test_the_scan_finds_it(code): assert len(faults(code)) == 1

def _numpy(save, bomb):
    save(out := io.BytesIO(), bomb)
    return out.getvalue()

def _torch(bomb, **how):
    torch.save(bomb, out := io.BytesIO(), **how)
    return out.getvalue()

BOMBS = {'pickle': lambda b: pickle.dumps(b), 'old pickle': lambda b: pickle.dumps(b, 0), 'npy': lambda b: _numpy(np.save, np.array([b], object)),
         'npz': lambda b: _numpy(lambda f, x: np.savez(f, a=x, e=x, metadata=x, b=x), np.array([b], object)),
         'pth': lambda b: _torch(dict(model=b, plan=b)), 'old pth': lambda b: _torch(dict(model=b, plan=b), _use_new_zipfile_serialization=False)}

def _load_carelessly(data, kind): # as a program would that trusts the file
    if kind.startswith('np'):
        found = np.load(io.BytesIO(data), allow_pickle=True)
        return found['a'] if kind == 'npz' else found
    return torch.load(io.BytesIO(data), weights_only=False) if 'pth' in kind else pickle.loads(data)

@pytest.mark.parametrize('kind', BOMBS)
def test_the_bombs_work(kind, tmp_path):
    with contextlib.suppress(FileExistsError): _load_carelessly(BOMBS[kind](Bomb(tmp_path/'ran')), kind)  # some make the folder twice
    assert (tmp_path/'ran').is_dir()

def in_folder(name):
    def place(folder, data):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
        return folder/name
    return place

def in_model(name):
    def place(folder, data):
        shutil.copytree(bad_models.tiny_model(), folder/'model')
        (folder/'model'/name).write_bytes(data)
        for sealed in ('model.safetensors', 'text/tokenizer.json'):
            if name == sealed: bad_models.resealed(folder/'model', name)
        return folder/'model'
    return place

def beside_weights(name): # a folder of transformers whose weights are a pickle
    def place(folder, data):
        shutil.copytree(bad_models.tiny_model()/'text', folder/'text')
        for p in (folder/'text').glob('*.safetensors'): p.unlink()
        (folder/'text'/'config.json').exists() or (folder/'text'/'config.json').write_text('{"model_type": "bert"}')
        (folder/'text'/name).write_bytes(data)
        return folder/'text'
    return place

def in_index(name):
    def place(folder, data):
        shutil.copytree(bad_models.tiny_index(), folder/'index')
        path, = (folder/'index').glob(name)
        path.write_bytes(data)
        return folder/'index'
    return place

def resealed_index(name): # as somebody would who wants it to be read
    def place(folder, data):
        from cmlf.search import _part_name
        in_index(f'part-*/{name}')(folder, data)
        part, = (folder/'index').glob('part-*')
        part = part.rename(part.with_name(_part_name(part)))
        bad_models.edit_json(folder/'index'/'index.json', part=part.name)
        return folder/'index'
    return place

def in_checkpoint(ending): # sealed again, as somebody would who wants it to be read
    def place(folder, data):
        write_state(folder, 'plan', dict(x=torch.ones(2)))
        (folder/f'000001.{ending}').write_bytes(data)
        if ending == 'safetensors':
            found = read_json(text := folder/'000001.json') | dict(tensors=file_hash(folder/'000001.safetensors'))
            found.pop('check')
            write_json(text, dict(check=content_hash(found, length=64), **found))
        return folder
    return place

def in_run(name):
    def place(folder, data):
        write_json(folder/'run.json', {})
        (folder/name).write_bytes(data)
        return folder
    return place

def plain_vectors(path): read_vectors(path); raise CmlfError('read as words') # a word2vec file may hold any bytes

PLACES = {   # what takes a file: how the bomb gets there, how it is read
    'PANNs weights, ResNet38': (in_folder('a.pth'), read_panns), 'PANNs weights, CNN14': (in_folder('a.pth'), lambda p: read_panns(p, 'CNN14')),
    'PANNs weights, safetensors': (in_folder('a.safetensors'), read_panns), 'weights of a model': (in_model('model.safetensors'), DualEncoder.load),
    'settings of a model': (in_model('encoders.json'), DualEncoder.load), 'tokenizer of a model': (in_model('text/tokenizer.json'), DualEncoder.load),
    'text model': (beside_weights('pytorch_model.bin'), lambda p: TextEncoder(str(p))),
    'CLAP': (beside_weights('pytorch_model.bin'), lambda p: __import__('cmlf.appendix.models').appendix.models._load_clap(str(p), None)),
    'checkpoint, a file': (in_folder('checkpoint.pt'), lambda p: Checkpoint(p, 'plan').load('cpu')),
    **{f'checkpoint, {s}': (in_checkpoint(s), lambda p: read_state(p, 1)) for s in ('safetensors', 'json')},
    'vectors': (in_folder('x.npy'), lambda p: read_npy(p, 'vectors')), 'features': (in_folder('x.npy'), lambda p: FeatureStore(p)[[0]]),
    **{f'expert features, {s}': (in_folder(f'f{s}'), lambda p: load_expert(p, ['a'], 2, 2)) for s in ('.npz', '.h5', '.hdf5', '.pkl')},
    'expert features, folder': (in_folder('f/a.npy'), lambda p: load_expert(p.parent, ['a'], 2, 2)),
    **{f'word vectors, {s}': (in_folder(f'w{s}'), plain_vectors) for s in ('.bin', '.txt', '.kv')},
    'record of an index': (in_index('index.json'), SoundIndex.open), 'arrays of an index': (resealed_index('arrays.npz'), lambda p: SoundIndex.open(p).find('rain', 1)),
    'neighbours of an index': (resealed_index('nearest.faiss'), SoundIndex.open), 'sounds of an index': (resealed_index('sounds.json'), SoundIndex.open),
    'ranks': (in_folder('r.npz'), read_ranks), 'embeddings of a run': (in_run('test.npz'), lambda p: Run(p).arrays['a']),
    'record of a run': (in_folder('run.json'), lambda p: Run(p.parent).metadata['x']), 'history of a run': (in_run('history.csv'), lambda p: Run(p).history['stage']),
    **{f'captions, {s}': (in_folder(f'm{s}'), load_corpus) for s in ('.csv', '.jsonl', '.parquet', '.json', '.pkl')},
    **{f'relevant clips, {s}': (in_folder(f'r{s}'), read_relevant_pairs) for s in ('.csv', '.json', '.parquet')},
    'JSON': (in_folder('a.json'), read_json)}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('place', PLACES)
def test_a_pickle_that_runs_code_is_refused_wherever_a_file_is_read(place, tmp_path):
    put, read = PLACES[place]
    for i, kind in enumerate(BOMBS):
        (folder := tmp_path/str(i)).mkdir()
        path = put(folder, BOMBS[kind](Bomb(tmp_path/'ran')))
        with pytest.raises(Exception) as e: read(path)
        assert not isinstance(e.value, NameError | AttributeError | ImportError | AssertionError), (kind, e.value)
        assert not (tmp_path/'ran').exists(), kind

# --- markup in captions and names

ATTACK = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b id=made>&amp;\' "quoted"'
NAME = ATTACK.replace('/', '∕') # a file name has no /

@pytest.fixture(scope='module')
def chrome(tmp_path_factory):
    with browser(tmp_path_factory.mktemp('browser')/'profile') as tab: yield tab

def picture(path):
    from cmlf.appendix.figures import write_spectrogram
    path.parent.mkdir(parents=True, exist_ok=True)
    write_spectrogram(np.zeros(32000, np.float32), path)

def found(path): return Hit(1, .5, 0, NAME, path, 0., 1., 1., [ATTACK, ATTACK])

def hits(tmp_path):
    "One whose sound is there, with a picture and a player; one whose sound is gone."
    soundfile.write(tmp_path/'a.wav', np.zeros(8000), 8000)
    return Hits([found(tmp_path/'a.wav'), found(tmp_path/'gone.wav')], ATTACK).html()

def table_of_hits(tmp_path):
    with pd.option_context('display.max_colwidth', None): return Hits([found(Path('a'))]).table()._repr_html_()

def cards_of(folder):
    picture(folder/'figures'/'a.png')
    (folder/'sounds').mkdir(exist_ok=True)
    (folder/'sounds'/NAME).write_bytes(b'x')
    clip = dict(id=NAME, caption=ATTACK, picture='figures/a.png', sound=f'sounds/{NAME}', credit=ATTACK)
    return [dict(verdict=v, query=ATTACK, rank=1, meant=clip, found=clip | dict(id=other)) for v, other in (('best', NAME), ('worst', 'b'))]

def notebook(tmp_path): return render('notebook.html', groups=view_cards(cards_of(tmp_path), tmp_path, False, base='../'))

def report(tmp_path):
    "Everything that a record can hold, with markup in it; also the tables of the claims."
    folder = tmp_path/'report'
    shutil.copytree(ROOT/'reports'/'mini', folder)
    for n in (1, 2, 3):
        record = read_json(folder/f'table{n}.json')
        record['corpus'] |= dict(name=ATTACK, about=ATTACK)
        record['asked'] |= dict(profile=ATTACK)
        for r in record['runs'].values(): r |= dict(name=ATTACK, commit=ATTACK, finished=ATTACK, precision=ATTACK, machine=dict(device=ATTACK, cores=ATTACK))
        for t in record['tables']: t |= dict(title=ATTACK, notes=[ATTACK])
        for f in record['figures']: f['caption'] = ATTACK
        if record['claims']:
            record['claims']['notes'] = [ATTACK]
            frame = pd.read_csv(folder/f'{record["claims"]["name"]}.csv').assign(comparison=ATTACK)
            frame.to_csv(folder/f'{record["claims"]["name"]}.csv', index=False)
        record['effects'] = [dict(name='e', title=ATTACK, head=[ATTACK, 'Verdict'], rows=[[ATTACK, ATTACK]], notes=[ATTACK])]
        record['cards'] = cards_of(folder)
        write_json(folder/f'table{n}.json', record)
        table = pd.read_csv(folder/f'table{n}.csv')
        table.assign(**{c: ATTACK for c in ('system', 'audio_encoder') if c in table}).to_csv(folder/f'table{n}.csv', index=False)
    (folder/'notebooks'/NAME).with_suffix('.ipynb').write_text('{}')
    return write_index(folder).read_text()

def served(tmp_path):
    sounds = [dict(file=NAME, captions=[ATTACK], seconds=1.)]
    return web.page(SimpleNamespace(facts=dict(model=ATTACK), sounds=sounds, root=tmp_path))

def markdown(text):
    return MarkdownIt('commonmark', dict(html=True)).enable('table').render(text)  # tags in a text are passed on

def card(tmp_path):
    m = dict(name=ATTACK, spec=dict(system='3cmlf', chm=True, batch_size=8, seed=0), train_clips=1, minutes=1., precision=ATTACK, commit=ATTACK,
             profile=dict(corpus=dict(source='manifest'), audio=dict(seconds=1., width=8, encoder=ATTACK), text=dict(text_model=ATTACK)),
             corpus=dict(name=ATTACK, hash='a'), pool=dict(coverage='1 of 1'))
    page = model_card(SimpleNamespace(folder=tmp_path, metadata=m))
    return markdown(page.split('---\n', 2)[2])

def credits(tmp_path):
    write_credits(SimpleNamespace(clips=[SimpleNamespace(credit=f'{ATTACK} | another ![x](x)')]), tmp_path/'CREDITS.md')
    return markdown((tmp_path/'CREDITS.md').read_text())

def table(tmp_path):
    frame = pd.read_csv(ROOT/'reports'/'mini'/'table1.csv').convert_dtypes()
    write_table(frame, 1, tmp_path/'t', f'Table I (ours on {ATTACK}, not on AudioCaps)', [ATTACK])
    return markdown((tmp_path/'t.md').read_text())

PAGES = dict(hits=hits, table_of_hits=table_of_hits, notebook=notebook, report=report, served=served, card=card, credits=credits, table=table)

def opened(chrome, tmp_path, body):
    text = body if body.lstrip().startswith('<!doctype') else f'<!doctype html><meta charset="utf-8"><body>{body}</body>'
    (tmp_path/'page.html').write_text(text, encoding='utf-8')
    chrome.open((tmp_path/'page.html').as_uri())
    chrome.value('document.querySelectorAll("details").forEach(d => d.open = true)')
    made = chrome.value('document.querySelectorAll("#made, img[src=x], [onerror]").length')
    scripts = chrome.value('[...document.scripts].filter(s => s.textContent.includes("hacked")).length')
    return chrome.value('window.hacked ?? 0'), made, scripts, chrome.value('document.body.innerText + document.title')

@pytest.mark.parametrize('name', PAGES)
def test_markup_is_shown_and_does_nothing(name, chrome, tmp_path):
    hacked, made, scripts, text = opened(chrome, tmp_path, PAGES[name](tmp_path))
    assert (hacked, made, scripts) == (0, 0, 0)
    assert '<b id=made>' in text  # it is there, as text

def test_markup_that_is_not_escaped_is_found(chrome, tmp_path):
    hacked, made, scripts, _ = opened(chrome, tmp_path, f'<p>{ATTACK}</p>')
    assert (hacked, made, scripts) == (1, 2, 1)

def test_every_template_escapes():
    "No template switches escaping off, and every function that renders one goes through `render`."
    for path in (ROOT/'cmlf'/'templates').iterdir():
        assert not re.search(r'\|\s*safe\b|autoescape', path.read_text()), path.name
    for path in (ROOT/'cmlf').rglob('*.py'):
        text = path.read_text()
        assert 'Markup(' not in text and text.count('Environment(') == (path.name == 'page.py'), path.name
        if path.name not in ('web.py', 'notebook_runs.py'): assert not re.search(r'''(?m)^[^#\n]*['"]<(?!p>Of|function|stdin)\w+[ >/]''', text), path.name

def test_names_in_the_caption_of_a_tex_table_are_text(tmp_path):
    frame = pd.read_csv(ROOT/'reports'/'mini'/'table1.csv').convert_dtypes()
    write_table(frame, 1, tmp_path/'t', r'on my_sounds \input{/etc/passwd} 5 % & more', [])
    assert r'\caption{on my\_sounds \textbackslash{}input\{/etc/passwd\} 5 \% \& more}' in (tmp_path/'t.tex').read_text()

# --- csv files that people open in a spreadsheet

FORMULAS = ['=cmd|\' /C calc\'!A0', '=1+1', '+1+cmd|x', '@SUM(A1)', '-2+3+cmd|\' /C calc\'!A0', '-A1(2)', '\t=1', '\r=1']

@pytest.mark.parametrize('text', FORMULAS)
def test_a_spreadsheet_finds_no_formula_in_the_coverage_report(text):
    assert for_sheets(pd.DataFrame(dict(id=[text]))).id[0] == "'" + text

@pytest.mark.parametrize('value', ['-0Fwbkmbb8', 'a=b', '', '/sounds/=a.wav', -3.5, True, None, 'ä'])
def test_other_cells_stay(value):
    found = for_sheets(pd.DataFrame(dict(id=[value, 'x']), dtype=object)).id[0]
    assert found == value or value is None and pd.isna(found)

def test_the_coverage_report_of_sounds_with_such_names(tmp_path, monkeypatch):
    monkeypatch.setenv('CMLF_CACHE', str(tmp_path/'cache'))
    (sounds := tmp_path/'sounds').mkdir()
    names = ['=1+1.wav', '-0Fwbkmbb8x.wav', 'a.wav']
    for i, n in enumerate(names): soundfile.write(sounds/n, np.sin(np.arange(8000) / (i + 3)), 8000)
    pd.DataFrame([(n, f'sound {i}', s) for i, (n, s) in enumerate(zip(names, ('train', 'val', 'test')))], columns=['path', 'caption', 'split']).to_csv(sounds/'manifest.csv', index=False)
    corpus = load_corpus(sounds/'manifest.csv', 1.)
    assert sorted(c.captions[0] for c in corpus.clips) == ['sound 0', 'sound 1', 'sound 2']
    report, = (tmp_path/'cache').rglob('*coverage.csv')
    text = report.read_text()
    assert "'=1+1" in text and not re.search(r'(^|,)"?[=+@]', text, re.M) and ',-0Fwbkmbb8x' in text

def test_tables_of_a_report_hold_no_text_of_others():
    "Their texts are names of systems: no cell begins like a formula. (Names of benchmarks are ours, and may.)"
    for path in [p for p in (ROOT/'reports').rglob('*.csv') if p.parent.name != 'benchmarks']:
        if not (text := path.read_text().strip()): continue  # a table without rows
        texts = [x for x in pd.read_csv(io.StringIO(text)).to_numpy().ravel() if isinstance(x, str)]
        assert for_sheets(pd.DataFrame(dict(x=texts), dtype=object)).x.tolist() == texts, path

# --- the server

def test_the_socket_is_bound_to_this_machine():
    pytest.importorskip('fastapi')
    for host in ('127.0.0.1', 'localhost'):
        with web._listen(host, 0) as sock: assert sock.getsockname()[0] == '127.0.0.1'
