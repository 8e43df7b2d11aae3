"""The catalogue of bad input, and random damage to valid files: the result is valid, or there is one error of one line.

Few examples by default; `CMLF_FUZZ=1000 pytest tests/test_bad_input.py -k fuzz` tests so many per loader."""
import contextlib, functools, io, json, math, os, resource, signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from cmlf import search
from cmlf.appendix import bad_input as b, bad_models as m
from cmlf.appendix.checkpoints import read_panns
from cmlf.appendix.encoding import windows_of
from cmlf.cli import run_command
from cmlf.config import GROUPS, SETTINGS
from cmlf.core import CmlfError, rng
from cmlf.data import read_relevance
from cmlf.features import load_audio, probe_audio, sound_blocks
from cmlf.layouts import load_corpus
from cmlf.search import SoundIndex, read_captions

pytest.importorskip('faiss', reason='searching needs the extra search')

FUZZ = int(os.environ.get('CMLF_FUZZ', 0)) # cases per loader; 0: a few

def cases(few): return settings(max_examples=FUZZ or few, derandomize=True, database=None, deadline=None,
                                suppress_health_check=list(HealthCheck))

class Hang(BaseException): "Took too long; no `except Exception` catches it."

@contextlib.contextmanager
def at_most(seconds):
    def stop(*_): raise Hang(f'more than {seconds} s')
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)

@pytest.fixture(scope='module', autouse=True)
def private(tmp_path_factory):
    "A cache of its own, and no hub."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CMLF_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        yield

# ---- the catalogue

def test_the_catalogue_is_large():
    assert len(m.CATALOGUE) >= 240 and len({(c.kind, c.name) for c in m.CATALOGUE}) == len(m.CATALOGUE)
    assert {c.kind for c in m.CATALOGUE} == set(b.READERS)

@pytest.mark.parametrize('case', m.CATALOGUE, ids=lambda c: f'{c.kind}: {c.name}')
def test_catalogue(case):
    with at_most(60): found = b.run(case)
    assert b.fault(case, found) == '', found

def test_another_outcome_is_a_fault():
    fine = b.Case('x', True, 'clips', None)
    assert b.fault(fine, b.Outcome(True, '3 clips', ())) == ''
    for found in ((None, 'KeyError: 5', ()), (False, 'no clips', ()), (True, '3 sounds', ()), (True, 'a\nclips', ()),
                  (True, 'clips' * 999, ()), (True, '3 clips', ('half.part',))): assert b.fault(fine, b.Outcome(*found))

# ---- the same on the command line: exit code 2, one line, nothing written

COMMANDS = dict(
    sound=lambda p, d: ['search', m.tiny_index(), '--audio', p],
    table=lambda p, d: ['data', '--profile', 'smoke', '--data', p, '--out', d/'written'],
    settings=lambda s, d: ['data', '--profile', 'smoke', *(a for x in s for a in ('--set', x))],
    vectors=lambda p, d: (['mine', p[0], '--groups', p[1]] if isinstance(p, tuple) else ['mine', p]) + [
        '--batch-size', '4', '--out', d/'batches.npy'],
    model=lambda p, d: ['index', m.tiny_index().parent/'sounds', '--model', p, '--out', d/'written'],
    index=lambda p, d: ['search', p, 'a dog barks'],
    relevance=lambda p, d: ['evaluate', m.tiny_model(), '--data', m.tiny_index().parent/'sounds'/'manifest.csv', '--relevance', p])

def on_the_command_line(kind):
    if kind == 'settings': return [c for c in b.PROFILES if not c.accepted and isinstance(c.make(None), list)
                                   and isinstance(c.make(None)[0], str)]
    found = [c for c in m.CATALOGUE if c.kind == kind and not c.accepted]
    return found if kind in ('table', 'vectors') else found[::4] # the others load a model for each

SOME = [c for kind in COMMANDS for c in on_the_command_line(kind)]

@pytest.mark.parametrize('case', SOME, ids=lambda c: f'{c.kind}: {c.name}')
def test_command(case, tmp_path, capsys):
    arguments = [str(a) for a in COMMANDS[case.kind](case.make(tmp_path), tmp_path)]
    before = b.contents(tmp_path)
    capsys.readouterr()
    with at_most(60): code = run_command(arguments)
    err = capsys.readouterr().err
    lines = err.splitlines()
    if case.kind == 'relevance': lines = [x for x in lines if 'coverage report' not in x and 'layout manifest' not in x] # of the good data
    assert code == 2 and len(lines) == 1 and lines[0].startswith('cmlf: '), err
    assert b.contents(tmp_path) == before and sorted(tmp_path.glob('written')) == []

def one_line(capsys, *arguments):
    capsys.readouterr()
    assert run_command([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    return err

def test_outputs_that_cannot_be_written(tmp_path, capsys):
    np.save(tmp_path/'x.npy', np.eye(8))
    (tmp_path/'folder.npy').mkdir()
    (tmp_path/'file').touch()
    before = b.contents(tmp_path)
    assert 'folder.npy: is a directory' in one_line(capsys, 'mine', tmp_path/'x.npy', '--batch-size', 4, '--out', tmp_path/'folder.npy')
    assert 'file' in one_line(capsys, 'data', '--profile', 'smoke', '--out', tmp_path/'file')
    sounds, model = m.tiny_index().parent/'sounds', m.tiny_model()
    assert 'file: file exists' in one_line(capsys, 'index', sounds, '--model', model, '--out', tmp_path/'file')
    assert b.contents(tmp_path) == before

def test_a_folder_of_bad_sounds_leaves_no_index(tmp_path, capsys):
    b.put(tmp_path/'sounds'/'a.wav', 'text')
    assert 'no sound to index' in one_line(capsys, 'index', tmp_path/'sounds', '--model', m.tiny_model(), '--out', tmp_path/'index')
    assert not (tmp_path/'index').exists()

def test_a_damaged_index_is_repaired_by_the_same_command(tmp_path):
    from cmlf.search import build_index
    index = m._in_part('nearest.faiss', b'')(tmp_path)
    with pytest.raises(CmlfError, match='damaged or changed'): SoundIndex.open(index)
    build_index(m.tiny_index().parent/'sounds', m.tiny_model(), index)
    assert len(SoundIndex.open(index)) == 3

def test_few_windows_at_a_time_where_they_are_large(tmp_path, monkeypatch):
    path, read = b._wav(tmp_path/'a.wav', b.tone(80000, 6)), []
    whole = [*windows_of(path, 1.)]
    monkeypatch.setattr('cmlf.appendix.encoding._VALUES', 2 * 6 * 8000) # four windows of a second
    monkeypatch.setattr('cmlf.appendix.encoding.sound_blocks', lambda f, n, size: read.append(n) or sound_blocks(f, n, size))
    parts = [*windows_of(path, 1.)]
    assert max(read) <= 2.5 * 8000 + 1 and len(read) > 1
    assert [w[:2] for w in parts] == [w[:2] for w in whole]
    for x, y in zip(parts, whole): assert np.abs(x.wave - y.wave)[500:-500].max() < 1e-3

# ---- random damage

def outcome(read, *given, seconds=30):
    "Whether it was accepted; a refusal is one line of reasonable length, and no other exception passes."
    try:
        with at_most(seconds): read(*given)
    except CmlfError as e:
        assert len(str(e).splitlines()) == 1 and len(str(e)) < 2000
        return False
    return True

@contextlib.contextmanager
def little_memory(gigabytes=1.):
    "The peak of the process grows by less than this; a file of a few kB cannot ask for more."
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    before = peak()
    yield
    assert peak() - before < gigabytes

@st.composite
def damaged(draw, data): # bytes
    "The bytes with one to four changes, most of them near the beginning, where headers are."
    for _ in range(draw(st.integers(1, 4))):
        near = min(len(data), 100)
        at = draw(st.one_of(st.integers(0, near), st.integers(0, len(data))))
        n = draw(st.sampled_from((1, 1, 2, 4, 4, 8, 100)))
        new = draw(st.one_of(st.binary(max_size=n), st.sampled_from((b'\0', b'\xff', b'\x7f', b'\x80')).map(lambda x: x * n)))
        how = draw(st.sampled_from(('change', 'change', 'change', 'insert', 'remove', 'cut', 'repeat')))
        if how == 'change': data = data[:at] + new + data[at + len(new):]
        elif how == 'insert': data = data[:at] + new + data[at:]
        elif how == 'remove': data = data[:at] + data[at + n:]
        elif how == 'cut': data = data[:at]
        else: data = data[:at] + data[max(0, at - n):at] * 3 + data[at:]
    return data

@functools.cache
def sounds():
    noise = rng(0, 'fuzz').uniform(-.5, .5, (1500, 2))
    forms = [('a.wav', {}), ('b.wav', dict(subtype='FLOAT')), ('c.wav', dict(subtype='PCM_24')), ('d.wav', dict(subtype='IMA_ADPCM')),
             ('a.flac', {}), ('a.ogg', {}), ('b.ogg', dict(subtype='OPUS')), ('a.mp3', {}), ('a.aiff', {}), ('a.au', {}), ('a.caf', {}), ('a.w64', {})]
    return {name: b._bytes(name, noise if k % 2 else noise[:, 0], **how) for k, (name, how) in enumerate(forms)}

def read_everywhere(path):
    probed = probe_audio(path, .5)
    wave = load_audio(path, .5)
    assert wave.shape == (16000,) and np.isfinite(wave).all() and not probed['error']
    assert all(np.isfinite(w.wave).all() for w, _ in zip(windows_of(path, .5), range(3)))

def test_fuzz_sounds(tmp_path):
    for name, data in sounds().items(): read_everywhere(b.put(tmp_path/name, data))
    found = []
    @cases(60)
    @given(st.sampled_from(sorted(sounds())), st.data())
    def fuzz(name, data): found.append(outcome(read_everywhere, b.put(tmp_path/name, data.draw(damaged(sounds()[name])))))
    with little_memory(): fuzz()
    assert {True, False} <= set(found)

WORDS = st.one_of(st.sampled_from(['a dog barks', 'a.wav', 'b.wav', '../a.wav', '/a.wav', 'train', 'test', 'val', '', ' ', '42', '\0', '\ufeff',
                                   '🐕', 'x' * 300, '"', "'", ',', ';', '\n', '\r\n', '\t', '\ud800', '=1+1', '[]', '["a.wav"]', '{}']),
                  st.text(max_size=8))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
                      lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(WORDS, x, max_size=2)), max_leaves=4)
COLUMNS = st.sampled_from(['path', 'file_name', 'audio', 'caption', 'captions', 'text', 'caption_1', 'caption_2', 'split', 'id', 'meaning',
                           'tags', 'credit', 'youtube_id', 'audiocap_id', 'start_time', 'query', 'audio_filenames', 'data', ''])
PLAIN = dict(path='a.wav', caption='a dog barks', split='train')
ROWS = st.lists(st.one_of(st.just(PLAIN), st.dictionaries(COLUMNS, VALUES, max_size=5),
                          st.dictionaries(COLUMNS, VALUES, max_size=2).map(lambda d: PLAIN | d)), min_size=1, max_size=4)

def as_csv(rows, comma):
    columns = list(dict.fromkeys(c for r in rows for c in r))
    cell = lambda v: '' if v is None else v if isinstance(v, str) else str(v)
    return '\n'.join([comma.join(columns), *(comma.join(cell(r.get(c)) for c in columns) for r in rows)])

def as_json(rows): return '\n'.join(map(json.dumps, rows))

@st.composite
def tables(draw): # (name, bytes)
    "A csv, jsonl, json or parquet file, made of strange rows or damaged."
    rows, name = draw(ROWS), draw(st.sampled_from(('m.csv', 'm.csv', 'm.jsonl', 'm.jsonl', 'm.json', 'm.tsv', 'm.parquet')))
    text = {'m.csv': lambda: as_csv(rows, ','), 'm.tsv': lambda: as_csv(rows, '\t'), 'm.jsonl': lambda: as_json(rows),
            'm.json': lambda: json.dumps(dict(data=rows)), 'm.parquet': parquet}[name]()
    data = text if isinstance(text, bytes) else text.encode('utf-8', draw(st.sampled_from(('replace', 'surrogatepass'))))
    return name, data if draw(st.booleans()) and name != 'm.parquet' else draw(damaged(data))

@functools.cache
def parquet():
    pd.DataFrame([PLAIN, PLAIN | dict(path='b.wav')]).to_parquet(to := io.BytesIO())
    return to.getvalue()

def read_rows_everywhere(path, sound):
    corpus = load_corpus(path, 1., audio=None if sound else False)
    assert len(corpus) and corpus.hash and len(corpus.groups()) == len(corpus)

def test_fuzz_tables(tmp_path):
    b._sounds(tmp_path)
    found = []
    @cases(100)
    @given(tables(), st.sampled_from((False, False, False, True)))
    def fuzz(table, sound):
        path = b.put(tmp_path/table[0], table[1])
        found.append(outcome(read_rows_everywhere, path, sound))
        path.unlink()
    with little_memory(): fuzz()
    assert {True, False} <= set(found)

def test_fuzz_captions_and_relevant_clips(tmp_path):
    corpus = load_corpus(b.manifest(tmp_path, b.ROWS), 1., audio=False)
    found = []
    @cases(60)
    @given(tables())
    def fuzz(table):
        path = b.put(tmp_path/table[0], table[1])
        found.append(outcome(read_captions, path))
        found.append(outcome(read_relevance, path, corpus))
        path.unlink()
    fuzz()
    assert {True, False} <= set(found)

NUMBERS = st.one_of(st.integers(-2, 9), st.integers(), st.floats(), st.sampled_from((10**400, 1e300, '1e999', 'nan', '-1', '0', '1', 'true', '')))

def test_fuzz_settings():
    keys = st.one_of(st.sampled_from([*SETTINGS, *GROUPS, *(f'{g}.{k}' for k, g in SETTINGS.items())]), WORDS)
    values = st.one_of(NUMBERS, VALUES, st.sampled_from(('easy+hard+random', 'equal_epochs', 'clap:', 'both')))
    dicts = st.dictionaries(keys, values, max_size=3)
    lists = st.lists(st.tuples(keys, values).map(lambda kv: f'{kv[0]}={kv[1]}'), max_size=3)
    found = []
    def read(given): assert all(math.isfinite(v) for g in b.get_profile('smoke', given).asdict().values() if isinstance(g, dict)
                                for v in g.values() if isinstance(v, (int, float)))
    @cases(200)
    @given(st.one_of(dicts, dicts, lists, st.dictionaries(keys, dicts, max_size=2), VALUES))
    def fuzz(given): found.append(outcome(read, given))
    fuzz()
    assert {True, False} <= set(found)

@functools.cache
def arrays(folder):
    return [b._npy(folder, x).read_bytes() for x in (b._X, b._X.astype('>f8'), (b._X * 99).astype('i4'), b._X.astype('f2').T)]

def test_fuzz_vectors(tmp_path):
    numbers = st.one_of(st.floats(width=32), st.floats(), st.integers(-2**60, 2**60), st.sampled_from((0, 1, math.nan, math.inf, 1e300, 1e-310)))
    shapes = st.sampled_from(((8, 4), (8, 1), (4, 2), (9, 3), (3, 4), (8,), (2, 4, 2), (8, 0), (0, 4), ()))
    types = st.sampled_from(('f8', 'f4', 'f2', '>f4', 'i1', 'u8', 'c8', 'U3', '?', 'M8[s]', 'S2'))
    found = []
    def make(data):
        if data.draw(st.booleans()): return b.put(tmp_path/'x.npy', data.draw(damaged(data.draw(st.sampled_from(arrays(tmp_path))))))
        shape = data.draw(shapes)
        values = data.draw(st.lists(numbers, min_size=1, max_size=5))
        x = np.resize(np.array(values, float), shape)
        with np.errstate(all='ignore'): return b._npy(tmp_path, x.astype(data.draw(types)))
    @cases(60)
    @given(st.data())
    def fuzz(data): found.append(outcome(b.read_vectors, make(data)))
    with little_memory(): fuzz()
    assert {True, False} <= set(found)

# ---- saved models and indexes: JSON with other values, and damaged bytes

@st.composite
def other_json(draw, value):
    "A JSON value with a change somewhere in it."
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        how = draw(st.sampled_from(('change', 'change', 'change', 'remove', 'rename')))
        rest = {k: v for k, v in value.items() if k != key}
        if how == 'remove': return rest
        if how == 'rename': return rest | {draw(st.text(max_size=4)): value[key]}
        return rest | {key: draw(other_json(value[key]))}
    if isinstance(value, bool) or not isinstance(value, (int, float)): return draw(VALUES)
    return draw(st.one_of(NUMBERS, VALUES))

@st.composite
def other_file(draw, data, name):
    "The bytes of a file with a change: of a value, if it is JSON, or of bytes."
    if name.endswith('.json') and draw(st.integers(0, 3)): return json.dumps(draw(other_json(json.loads(data)))).encode()
    return draw(damaged(data))

def test_fuzz_models(tmp_path):
    folder, found = m._model(tmp_path), []
    names = ['encoders.json', 'encoders.json', 'config.json', 'text/text.json', 'text/config.json', 'text/tokenizer_config.json',
             'model.safetensors']
    whole = {n: (folder/n).read_bytes() for n in [*names, 'text/tokenizer.json']}
    run = json.dumps(dict(key='k', profile=dict(audio=dict(seconds=1., hop=320)))).encode()
    @cases(12)
    @given(st.data())
    def fuzz(data):
        name, seal = data.draw(st.sampled_from(names)), data.draw(st.booleans())
        b.put(folder/name, data.draw(other_file(whole[name], name)))
        if seal and name not in ('encoders.json', 'config.json'):
            if name == 'text/text.json': m._reseal(folder/'encoders.json', [name])
            else: m.resealed(folder, name)
        if name == 'config.json' and seal: # a run instead
            (folder/name).unlink()
            b.put(folder/'run.json', data.draw(other_file(run, 'run.json')))
        try: found.append(outcome(m.read_model, folder, seconds=60))
        finally:
            for n, x in whole.items(): b.put(folder/n, x)
            (folder/'run.json').unlink(missing_ok=True)
    with little_memory(2): fuzz()
    assert False in found

def test_fuzz_weights(tmp_path):
    zipped = m._pth(tmp_path, dict(model=dict(a=torch.ones(3, 2), b=torch.zeros(5, dtype=torch.half)))).read_bytes()
    old = io.BytesIO()
    torch.save(dict(model=dict(a=torch.ones(3, 2))), old, _use_new_zipfile_serialization=False)
    found = []
    @cases(60)
    @given(st.sampled_from((zipped, old.getvalue())).flatmap(damaged))
    def fuzz(data): found.append(outcome(read_panns, b.put(tmp_path/'a.pth', data)))
    with little_memory(): fuzz()
    assert {True, False} <= set(found)

def test_fuzz_indexes(tmp_path, monkeypatch):
    index, found = m._index(tmp_path), []
    load = functools.cache(search._load)
    monkeypatch.setattr('cmlf.search._load', lambda name: load(name) if Path(name) == m.tiny_model() else search.model_folder(name))
    part, = index.glob('part-*')
    files = ['index.json', 'index.json', 'index.json', f'{part.name}/sounds.json', f'{part.name}/arrays.npz', f'{part.name}/nearest.faiss']
    whole = {n: (index/n).read_bytes() for n in files}
    @cases(30)
    @given(st.data())
    def fuzz(data):
        name = data.draw(st.sampled_from(files))
        b.put(index/name, data.draw(other_file(whole[name], name)))
        try: found.append(outcome(m.read_search, index))
        finally: b.put(index/name, whole[name])
    with little_memory(): fuzz()
    assert False in found
