"""Word vectors and expert features in every file format, missing experts, and invalid input."""
import gzip, sys, types

import h5py
import numpy as np
import pytest
import torch

from cmlf import baselines as b
from cmlf.appendix.experts import Words, load_expert, load_words, read_vectors, vector_format
from cmlf.core import CmlfError

VECTORS = {'dog': [1., 0, 2], 'barks': [0, 1, 0], 'rain': [1, 1, -3]}

def text(vectors): return ''.join(f'{w} {" ".join(map(str, v))}\n' for w, v in vectors.items())

def binary(vectors, end=b''):
    head = f'{len(vectors)} 3\n'.encode()
    return head + b''.join(w.encode() + b' ' + np.float32(v).tobytes() + end for w, v in vectors.items())

WORD_FILES = {'glove.txt': text(VECTORS).encode(), 'w2v.txt': b'3 3\n' + text(VECTORS).encode(),
              'w2v.bin': binary(VECTORS), 'lines.bin': binary(VECTORS, b'\n'), 'unended.txt': text(VECTORS).encode().rstrip(),
              'glove.txt.gz': gzip.compress(text(VECTORS).encode()), 'w2v.bin.gz': gzip.compress(binary(VECTORS))}

@pytest.mark.parametrize('name', WORD_FILES)
def test_every_format_of_word_file(tmp_path, name):
    path = tmp_path/name
    path.write_bytes(WORD_FILES[name])
    file = read_vectors(path)
    assert vector_format(path)[0] == ('.bin' in name)
    assert {w: file[w].tolist() for w in VECTORS} == VECTORS and 'cat' not in file
    words = load_words(path, ['dog barks loudly', 'xyzzy'])
    ids = words.encode(['dog barks loudly', 'xyzzy', ''], 4)
    assert (ids > 0).sum(1).tolist() == [2, 1, 1]
    assert words.table[ids[0, :2]].tolist() == [VECTORS['dog'], VECTORS['barks']]
    assert torch.equal(words.table[ids[1, 0]], torch.tensor(list(VECTORS.values())).mean(0))
    assert not words.table[0].any()

@pytest.mark.parametrize('content, message', [
    (None, 'no such file'), (b'', 'empty'), (b'\x1f\x8b\x08\x00', 'gunzip'), (b'word\n', 'begins with neither'),
    (b'3 3\n', 'damaged|no word vectors'), (binary(VECTORS)[:-2], 'damaged'), (b'dog 1 0 2\nbarks 0 1\n', "'barks' is not 3 numbers"),
    (b'dog 1 0 2\nbarks 0 x 1\n', "'barks' is not 3 numbers"), (b'dog 1 0 2\nbarks 0 nan 1\n', "'barks' is not 3 numbers"),
    (b'dog 1 0 2\nbarks 0\n', "'barks' is not 3 numbers"), (b'dog 1 0 2\n. . 1 0 2\n', 'line 2'), (b'katze 1 0 2\n', 'has no word of the captions')])
def test_bad_word_files(tmp_path, content, message):
    path = tmp_path/'words.txt'
    if content is not None: path.write_bytes(content)
    with pytest.raises(CmlfError, match=message) as e: load_words(path, ['dog barks'])
    assert str(path) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['glove.txt.gz', 'w2v.bin.gz'])
def test_a_truncated_download_is_named(tmp_path, name):
    path = tmp_path/name
    path.write_bytes(WORD_FILES[name][:-9])
    with pytest.raises(CmlfError, match=f'{name}: ') as e: load_words(path, ['dog barks'])
    assert '\n' not in str(e.value)

def test_without_gensim_the_fix_is_named(tmp_path, monkeypatch):
    (tmp_path/'words.txt').write_text(text(VECTORS))
    monkeypatch.setitem(sys.modules, 'gensim.models', None)
    with pytest.raises(CmlfError, match=r"words.txt: .*pip install 'cmlf\[words\]'"): load_words(tmp_path/'words.txt', ['dog'])

def write_features(folder, ext, arrays):
    if ext == 'npy':
        folder = folder/'features'; folder.mkdir()
        for key, x in arrays.items(): np.save(folder/f'{key}.npy', x)
        return folder
    path = folder/f'features.{ext}'
    if ext == 'npz': np.savez(path, **arrays)
    else:
        with h5py.File(path, 'w') as f:
            for key, x in arrays.items(): f[key] = x
    return path

FORMATS = 'npy', 'npz', 'h5', 'hdf5'

@pytest.mark.parametrize('ext', FORMATS)
def test_every_format_of_feature_file(tmp_path, ext):
    a = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    arrays = {'Y-a_1': a, 'b': a[:2], 'nan': np.full((2, 4), np.nan), 'lone': np.nan, 'empty': np.zeros((0, 4))}
    X, available = load_expert(write_features(tmp_path, ext, arrays), [*arrays, 'absent'], 3, 4)
    assert X.dtype == np.float32 and available.tolist() == [True, True, False, False, False, False]
    np.testing.assert_array_equal(X[0], a[:3])
    np.testing.assert_array_equal(X[1], [*a[:2], np.zeros(4)])
    assert not X[2:].any()

@pytest.mark.parametrize('ext', FORMATS)
def test_a_wrong_width_names_file_and_clip(tmp_path, ext):
    path = write_features(tmp_path, ext, {'a': np.ones((2, 4)), 'b': np.ones((2, 5))})
    with pytest.raises(CmlfError, match=r"clip 'b' have shape \(2, 5\), expected \(n, 4\)") as e:
        load_expert(path, ['a', 'b'], 3, 4)
    assert str(path) in str(e.value)

@pytest.mark.parametrize('name, content', [('x.npz', b'junk'), ('x.h5', b'junk'), ('x.pickle', b'junk'), ('absent.h5', None)])
def test_bad_feature_files(tmp_path, name, content):
    if content: (tmp_path/name).write_bytes(content)
    with pytest.raises(CmlfError, match=name): load_expert(tmp_path/name, ['a'], 3, 4)

def test_a_damaged_npy_and_unknown_clips(tmp_path):
    (tmp_path/'a.npy').write_bytes(b'junk')
    with pytest.raises(CmlfError, match="clip 'a' is not readable"): load_expert(tmp_path, ['a'], 3, 4)
    with pytest.raises(CmlfError, match='none of the 2 clips'): load_expert(tmp_path, ['x', 'y'], 3, 4)

def model(**settings):
    torch.manual_seed(0)
    s = b.CESettings(**{**dict(shared_dim=8, clusters=3, text_clusters=2), **settings})
    return b.CE(dict(audio=4, vggsound=6), 5, s)

VARIANTS = [dict(), dict(sequential=False), dict(use_ce=False), dict(use_ce=False, mimic_ce_dims=True), dict(mask_padding=True)]

@pytest.mark.parametrize('settings', VARIANTS)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('filling', [float('nan'), 1e6, -1.])
def test_a_missing_expert_has_no_influence(settings, training, filling):
    net, X = model(**settings).train(training), torch.randn(6, 7, 5)
    audio, sound, available = torch.randn(6, 3, 4), torch.randn(6, 9, 6), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    def run(audio): return net(X, dict(audio=(audio, available), vggsound=(sound, torch.ones(6).bool())), X.any(-1))
    other = audio.clone(); other[~available] = filling
    assert torch.equal(run(audio), run(other)) and run(other).abs().max() <= 1 + 1e-6
    run(other).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())

@pytest.mark.parametrize('settings', VARIANTS)
def test_a_clip_is_scored_by_its_other_experts(settings):
    net = model(**settings).eval()
    X, e = torch.randn(3, 7, 5), dict(audio=(torch.randn(2, 3, 4), torch.tensor([True, False])),
                                      vggsound=(torch.randn(2, 9, 6), torch.ones(2).bool()))
    t, w = net.embed_text(X)
    vectors, a = net.embed_audio(e)
    torch.testing.assert_close(net(X, e)[:, 1], t[1] @ vectors[1][1])
    assert a.tolist() == [[1, 1], [0, 1]]

def test_padding_has_an_effect_only_without_mask():
    X = torch.randn(4, 5, 5)
    wide, real = torch.nn.functional.pad(X, (0, 0, 0, 9)), torch.arange(14).expand(4, 14) < 5
    for settings, same in ((dict(mask_padding=True), True), (dict(), False)):
        net = model(**settings).eval()
        t, w = net.embed_text(X, real[:, :5])
        t2, w2 = net.embed_text(wide, real)
        assert torch.allclose(w, w2, atol=1e-6) == same and torch.allclose(t[0], t2[0], atol=1e-6) == same

class Clips(types.SimpleNamespace):
    def __len__(self): return self.n

def toy_data(n=12, **change):
    draw = np.random.default_rng(0)
    corpus = Clips(captions=['dog barks'] * 2 * n, owner=np.repeat(np.arange(n), 2), n=n)
    experts = lambda: dict(audio=(draw.normal(size=(n, 3, 4)).astype('f'), np.ones(n, bool)),
                           vggsound=(draw.normal(size=(n, 5, 6)).astype('f'), np.ones(n, bool)))
    return corpus, {s: experts() for s in ('train', 'val', 'test')}

WORDS = Words(np.random.default_rng(0).normal(size=(2, 5)), lambda c: [('dog', 'barks').index(w) for w in c.split()])
TINY = b.CESettings(shared_dim=8, clusters=2, text_clusters=2, max_words=3, epochs=2, batch_size=11)

def train(corpus, experts, settings=TINY, **kw):
    return b.train_ce(corpus, corpus, corpus, experts, WORDS, settings, log=lambda line: None, **kw)

@pytest.mark.parametrize('select', ['t2a', 'both'])
def test_training_is_reproducible_and_a_last_batch_of_one_is_skipped(select):
    settings = b.CESettings(**{**vars(TINY), 'select': select})  # 12 clips in batches of 11
    runs = [train(*toy_data(), settings, seed=s) for s in (0, 0, 1)]
    assert runs[0].history == runs[1].history != runs[2].history
    assert runs[0].sim.shape == (24, 12) and np.isfinite(runs[0].sim).all()
    assert 1 <= runs[0].best_epoch <= 2 and set(runs[0].test.t2a) == {'R@1', 'R@5', 'R@10'}

def invalid_data(what):
    corpus, e = toy_data()
    x, a = e['val']['audio']
    if what == 'shape': e['val']['audio'] = (x[:5], a)
    if what == 'nan': x[3] = np.nan
    if what == 'none': a[4] = e['val']['vggsound'][1][4] = False
    if what == 'width': e['val']['audio'] = (x[..., :2], a)
    if what == 'split': del e['test']
    if what == 'caption': corpus.owner = np.where(corpus.owner == 5, 6, corpus.owner)
    return corpus, e

@pytest.mark.parametrize('what, message', [('shape', r'val: expert audio: features \(5, 3, 4\)'), ('nan', 'val: expert audio has NaN for clip 3'),
                                        ('none', 'val: no expert has features for clip 4'), ('width', "val: widths of experts are {'audio': 2"),
                                        ('split', "unknown split of the experts 'test'"), ('caption', 'train: clip 5 has no caption')])
def test_invalid_training_data_is_named(what, message):
    with pytest.raises(CmlfError, match=message): train(*invalid_data(what))

def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    lines, (corpus, experts) = [], toy_data()
    fit = lambda **kw: b.train_ce(corpus, corpus, corpus, experts, WORDS, TINY, checkpoint=tmp_path/'run', save_every=0, log=lines.append, **kw)
    whole = fit()
    newest = max((tmp_path/'run').glob('*.json'))
    newest.write_text('{}')
    lines.clear()
    again = fit()
    assert newest.name in lines[0] and 'the state before it is used' in lines[0]
    assert again.history == whole.history and np.array_equal(again.sim, whole.sim)
    with pytest.raises(CmlfError, match='another run'): fit(seed=1)
