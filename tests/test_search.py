"Indexing a folder of sounds and searching it: updates, interruptions, bad input, many files."
import json, multiprocessing, os, random, signal, time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from cmlf.appendix.nearest import build_nearest, recall_of, sample_queries
from cmlf.appendix.resume import only_one
from cmlf.appendix.sound_store import sound_files
from cmlf.cli import run_command
from cmlf.core import CmlfError, rng, seed_everything
from cmlf.encoders import DualEncoder, ResNet38, TextEncoder
from cmlf.features import SAMPLE_RATE
from cmlf.search import Hits, SoundIndex, build_index
from command import cmlf

pytest.importorskip('faiss', reason='searching needs the extra search')

def wave(seed, seconds=1.): return rng(seed, 'wave').uniform(-.5, .5, round(seconds * SAMPLE_RATE)).astype(np.float32)

def saved_model(folder, seed=0):
    seed_everything(seed)
    model = DualEncoder(ResNet38(width=1), TextEncoder('tiny'), 8, 16)
    model.seconds = 2
    model.save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def model(tmp_path_factory): return saved_model(tmp_path_factory.mktemp('model')/'m')

@pytest.fixture
def sounds(tmp_path):
    folder = tmp_path/'sounds'
    (folder/'deep'/'er').mkdir(parents=True)
    for i, name in enumerate(('a.wav', 'b.flac', 'deep/c.wav', 'deep/er/d.ogg')): sf.write(folder/name, wave(i, 1 + i), SAMPLE_RATE)
    return folder

def contents(index): # what a search depends on
    v = index.nearest.reconstruct_n(0, index.nearest.ntotal)
    return [s['file'] for s in index.sounds], v, {k: index.arrays[k] for k in ('sound', 'start', 'stop', 'owner', 'text')}

def same(a, b):
    (f, v, x), (g, w, y) = contents(a), contents(b)
    return f == g and np.allclose(v, w, atol=1e-6) and all(np.allclose(x[k], y[k], atol=1e-6) for k in x)

def test_an_update_equals_a_new_index(model, sounds, tmp_path):
    assert build_index(sounds, model, tmp_path/'i')['new'] == 4
    sf.write(sounds/'new.wav', wave(9), SAMPLE_RATE)
    (sounds/'a.wav').unlink()
    (sounds/'b.flac').rename(sounds/'renamed.flac')
    sf.write(sounds/'deep'/'c.wav', wave(10), SAMPLE_RATE)  # edited
    sf.write(sounds/'twice.wav', wave(9), SAMPLE_RATE)  # the same content as another file
    assert build_index(sounds, model, tmp_path/'i')['new'] == 2
    build_index(sounds, model, tmp_path/'fresh')
    updated, fresh = (SoundIndex.open(tmp_path/n) for n in ('i', 'fresh'))
    assert same(updated, fresh) and [s['file'] for s in updated.sounds] == ['deep/c.wav', 'deep/er/d.ogg', 'new.wav', 'renamed.flac', 'twice.wav']
    assert sorted(p.name for p in (tmp_path/'i').iterdir() if p.name.startswith('part')) == [json.loads((tmp_path/'i'/'index.json').read_text())['part']]

def test_a_file_touched_but_unchanged_is_not_encoded_again(model, sounds, tmp_path):
    build_index(sounds, model, tmp_path/'i')
    os.utime(sounds/'a.wav', (1, 1))
    assert build_index(sounds, model, tmp_path/'i')['new'] == 0

def _index(*arguments):
    import torch
    torch.set_num_threads(1)
    build_index(*arguments)

def test_killed_at_any_moment(model, sounds, tmp_path, monkeypatch):
    "After SIGKILL there is the old index, the new one, or a clear message; the next command completes it."
    monkeypatch.setattr('cmlf.appendix.sound_store._AT_ONCE', 1)
    build_index(sounds, model, tmp_path/'whole')
    whole = SoundIndex.open(tmp_path/'whole')
    start = time.monotonic(); build_index(sounds, model, tmp_path/'timed'); takes = time.monotonic() - start
    fork, r, killed = multiprocessing.get_context('fork'), random.Random(0), 0
    for trial in range(int(os.environ.get('CMLF_KILLS', 8))):
        out = tmp_path/f'i{trial}'
        process = fork.Process(target=_index, args=(sounds, model, out))
        process.start()
        process.join(r.uniform(0, 1.3 * takes))
        if process.is_alive(): os.kill(process.pid, signal.SIGKILL); killed += 1
        process.join()
        try: assert same(SoundIndex.open(out), whole)
        except CmlfError as e: assert 'not finished' in str(e) or 'no index here' in str(e)
        build_index(sounds, model, out)
        assert same(SoundIndex.open(out), whole) and not [*out.glob('.part-*')]
    assert killed >= 3

def test_two_commands_at_once(model, sounds, tmp_path):
    (tmp_path/'i').mkdir()
    with only_one(tmp_path/'i', 'index'), pytest.raises(CmlfError, match='another command writes'): build_index(sounds, model, tmp_path/'i')

def test_an_index_of_another_model_is_refused(model, sounds, tmp_path):
    other = saved_model(tmp_path/'other', 1)
    build_index(sounds, model, tmp_path/'i')
    with pytest.raises(CmlfError, match='made with another model'): SoundIndex.open(tmp_path/'i', other)
    with pytest.raises(CmlfError, match='an index of another model'): build_index(sounds, other, tmp_path/'i')
    moved = tmp_path/'moved'
    Path(model).rename(moved)
    try:
        with pytest.raises(CmlfError, match='no such folder'): SoundIndex.open(tmp_path/'i')
        assert len(SoundIndex.open(tmp_path/'i', moved)) == 4
    finally: moved.rename(model)

def test_half_written_and_foreign_folders(model, sounds, tmp_path):
    build_index(sounds, model, tmp_path/'i')
    record = json.loads((tmp_path/'i'/'index.json').read_text())
    (tmp_path/'i'/record['part']).rename(tmp_path/'gone')
    with pytest.raises(CmlfError, match='is missing; run the same'): SoundIndex.open(tmp_path/'i')
    (tmp_path/'i'/'index.json').write_text('{"version": 99}')
    with pytest.raises(CmlfError, match='not an index of this version'): SoundIndex.open(tmp_path/'i')
    (tmp_path/'i'/'index.json').write_text('{"vers')
    with pytest.raises(CmlfError, match='index.json'): SoundIndex.open(tmp_path/'i')
    (tmp_path/'i'/'vectors.db').write_bytes(b'junk' * 999)
    with pytest.raises(CmlfError, match='delete it and index the folder again'): build_index(sounds, model, tmp_path/'i')

def test_unusable_files_are_listed(model, sounds, tmp_path):
    (sounds/'text.wav').write_text('no sound'); (sounds/'empty.wav').write_bytes(b'')
    (sounds/'dead.wav').symlink_to('nowhere'); os.mkfifo(sounds/'pipe.wav')
    os.symlink(b'nowhere', os.fsencode(sounds) + b'/dead\xff.wav')
    sf.write(sounds/'nan.wav', np.full(9999, np.nan), SAMPLE_RATE, subtype='FLOAT')
    (sounds/'folder.wav').mkdir()
    whole = (sounds/'a.wav').read_bytes()
    (sounds/'half.wav').write_bytes(whole[:len(whole) // 2])
    with open(os.fsencode(sounds) + b'/odd\xff.wav', 'wb') as f: f.write(whole)
    facts = build_index(sounds, model, tmp_path/'i')
    assert set(facts['skipped']) == {'text.wav', 'empty.wav', 'dead.wav', 'pipe.wav', 'nan.wav', 'half.wav', 'odd?.wav', 'dead?.wav'} and facts['sounds'] == 4

def test_nothing_of_others_is_deleted_or_replaced(model, sounds):
    "The index may be in the folder of the sounds itself; it removes only what it has written."
    for name in ('part-1', '.part-x'):
        (sounds/name).mkdir()
        sf.write(sounds/name/'e.wav', wave(7), SAMPLE_RATE)
    assert build_index(sounds, model, sounds)['sounds'] == 5
    sf.write(sounds/'f.wav', wave(8), SAMPLE_RATE)
    assert build_index(sounds, model, sounds)['sounds'] == 6
    assert (sounds/'part-1'/'e.wav').exists() and (sounds/'.part-x'/'e.wav').exists()
    assert len([p for p in sounds.glob('part-*') if (p/'sounds.json').exists()]) == 1
    (sounds/'deep'/'index.json').write_text('[1, 2]')
    with pytest.raises(CmlfError, match='not of an index; choose another folder'): build_index(sounds, model, sounds/'deep')
    assert (sounds/'deep'/'index.json').read_text() == '[1, 2]'

def test_folders_behind_links_and_folders_that_cannot_be_opened(sounds, tmp_path, monkeypatch):
    (tmp_path/'more').mkdir(); sf.write(tmp_path/'more'/'g.wav', wave(5), SAMPLE_RATE)
    (sounds/'link').symlink_to(tmp_path/'more'); (sounds/'deep'/'loop').symlink_to(sounds)
    (sounds/'before').symlink_to(sounds/'deep') # sorts before its target, whose name counts
    found, skipped = sound_files(sounds)
    assert found == ['a.wav', 'b.flac', 'deep/c.wav', 'deep/er/d.ogg', 'link/g.wav'] and not skipped
    scandir = os.scandir
    def closed(path):
        if str(path).endswith('er'): raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', closed)
    assert sound_files(sounds)[1] == {'deep/er': 'permission denied'}

def test_the_length_of_windows_belongs_to_the_model(model, sounds, tmp_path):
    build_index(sounds, model, tmp_path/'i')
    shorter = DualEncoder.from_pretrained(model)
    shorter.seconds = 1
    shorter.save_pretrained(tmp_path/'shorter')
    with pytest.raises(CmlfError, match='an index of another model'): build_index(sounds, tmp_path/'shorter', tmp_path/'i')

@pytest.mark.parametrize('name', ['./a.wav', 'deep/../a.wav', '{sounds}/a.wav'])
def test_files_of_captions_are_found_under_any_name(model, sounds, tmp_path, name):
    (sounds/'manifest.csv').write_text(f'audio,text\n{name.format(sounds=sounds)},rain on a roof\n')
    assert build_index(sounds, model, tmp_path/'i')['captions'] == 1

def test_the_folder_of_the_index_may_be_inside(model, sounds):
    build_index(sounds, model, sounds/'index')
    assert build_index(sounds, model, sounds/'index')['sounds'] == 4 and sound_files(sounds, sounds/'index')[0] == sound_files(sounds)[0]

@pytest.mark.parametrize('table, message', [
    ('path,caption\nmissing.wav,rain\n', 'none of its files'), ('file,caption\na.wav,rain\n', 'no file'),
    ('path,caption\na.wav,\n', 'row 2'), ('path,words\na.wav,rain\n', 'caption'), ('', 'empty')])
def test_wrong_captions(model, sounds, tmp_path, table, message):
    (tmp_path/'c.csv').write_text(table)
    with pytest.raises(CmlfError, match=message): build_index(sounds, model, tmp_path/'i', tmp_path/'c.csv')

def test_captions_and_sentences(model, sounds, tmp_path):
    (sounds/'manifest.csv').write_text('path,caption\na.wav,rain\na.wav,more rain\ndeep/er/d.ogg,=1+1 <b>bells</b>\n')
    assert build_index(sounds, model, tmp_path/'i')['captions'] == 3
    index = SoundIndex.open(tmp_path/'i')
    found = index.sentences(sounds/'a.wav', 2)
    v, t = index.model.encode_audio([sounds/'a.wav'])[0], index.model.encode_text(['rain', 'more rain', '=1+1 <b>bells</b>'])
    assert [f['caption'] for f in found] == [['rain', 'more rain', '=1+1 <b>bells</b>'][i] for i in np.argsort(-(t @ v))[:2]]
    assert '<b>bells' not in index.find('bells', 4).html() and '&lt;b&gt;bells' in index.find('bells', 4).html()

def test_hits_are_the_best_windows_of_each_file(model, sounds, tmp_path):
    build_index(sounds, model, tmp_path/'i')
    index = SoundIndex.open(tmp_path/'i')
    v = index.model.encode_text(['rain'])[0]
    scores = index.nearest.reconstruct_n(0, index.nearest.ntotal) @ v
    best = {i: scores[index.arrays['sound'] == i].max() for i in range(4)}
    found = index.find(' rain ', 99)
    assert sorted(h.sound for h in found) == [0, 1, 2, 3] and np.allclose([h.score for h in found], sorted(best.values())[::-1])
    assert np.allclose([h.score for h in found], [best[h.sound] for h in found])
    long = next(h for h in found if h.file == 'deep/er/d.ogg')
    assert long.stop - long.start == pytest.approx(2) and long.seconds == pytest.approx(4, abs=.01)
    assert (sounds/'a.wav').unlink() is None and 'a.wav' in found.html()  # its card has no picture

def test_a_graph_finds_what_an_exact_search_finds():
    r = rng(0, 'graph')
    x = r.standard_normal((50, 32))[r.integers(50, size=4000)] + .5 * r.standard_normal((4000, 32))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    exact, graph = build_nearest(x)[0], build_nearest(x, large=1)[0]
    assert hasattr(graph, 'hnsw') and recall_of(graph, exact, sample_queries(x, 300)) > .95

def test_commands(model, sounds, tmp_path, capsys):
    out = tmp_path/'i'
    (sounds/'bad.wav').write_text('no sound')
    made = cmlf('index', sounds, '--model', model, '--out', out, '--json')
    assert json.loads(made.stdout)['sounds'] == 4 and list(json.loads(made.stdout)['skipped']) == ['bad.wav']
    found = json.loads(cmlf('search', out, 'rain', '-k', 2, '--json').stdout)
    assert [h['rank'] for h in found['hits']] == [1, 2]
    table = cmlf('search', out, '--audio', sounds/'b.flac').stdout
    assert 'b.flac' in table and table.startswith('| rank')
    assert 'caption' not in table, 'the index has no captions'
    assert 'search: exact' in cmlf('index', sounds, '--model', model, '--out', out).stdout
    assert cmlf('search', out, 'a', 'dog', 'barks').stdout == cmlf('search', out, 'a dog barks').stdout != ''
    assert Hits([]).table().empty
    for wrong in (['search', out, ' '], ['search', tmp_path/'no', 'rain'], ['search', out, 'rain', '-k', 0],
                  ['index', tmp_path/'no', '--model', model, '--out', out], ['search', out, '--audio', sounds/'bad.wav']):
        assert run_command([str(w) for w in wrong]) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1 and error.startswith('cmlf: '), error
