"Ranks, recall and mAP against plain loops, with ties and several right clips; odd input; ties on real captions."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score

from cmlf import metrics
from cmlf.appendix import cosines
from cmlf.core import CmlfError
from cmlf.metrics import Retrieval, interval, paired_test, retrieval, retrieval_from_similarity

quick = settings(max_examples=60, deadline=None)


# ---- the definitions, one item at a time

def plain_ranks(scores, right):
    "Ranks of the relevant items, best first: relevant items before it, others above, half of the others with equal scores."
    others = [s for i, s in enumerate(scores) if i not in right]
    mine = sorted((scores[i] for i in right), reverse=True)
    return [j + sum(s > v for s in others) + sum(s == v for s in others) / 2 for j, v in enumerate(mine)]


def plain_ap(ranks, k):
    "AP@k by its definition."
    total = 0
    for rank in ranks:
        if rank < k: total += sum(p <= rank for p in ranks) / (rank + 1)
    return total / min(k, len(ranks))


def check(r, sim, owner, relevant=None):
    "A Retrieval against loops over queries and items."
    T, C = len(sim), len(sim[0])
    right = [{int(owner[t])} | set(relevant[t] if relevant else ()) for t in range(T)]
    ranks = dict(t2a=[plain_ranks(list(sim[t]), right[t]) for t in range(T)],
                  a2t=[plain_ranks([sim[t][c] for t in range(T)], {t for t in range(T) if c in right[t]})
                       for c in range(C)])
    for d, of in ranks.items():
        assert r.ranks(d).tolist() == [p[0] for p in of]
        for k in (1, 2, 3, 10, 16):
            assert r.recall(k, d) == pytest.approx(100 * np.mean([p[0] < k for p in of]))
            assert r.average_precision(k, d) == pytest.approx([plain_ap(p, k) for p in of])
            assert r.map(k, d) == pytest.approx(100 * np.mean([plain_ap(p, k) for p in of]))


@st.composite
def pools(draw, values=4):
    "(similarities of few values, owners, relevant sets)."
    C = draw(st.integers(1, 7))
    owner = draw(st.permutations([c for c in range(C) for _ in range(draw(st.integers(1, 4)))]))
    sim = [[draw(st.integers(0, values)) for _ in range(C)] for _ in owner]
    return sim, owner, [draw(st.sets(st.integers(0, C - 1), max_size=3)) for _ in owner]


@quick
@given(pool=pools(), tile=st.sampled_from([1, 2, 5, 1024]))
def test_ties_and_sets_against_loops(pool, tile):
    sim, owner, relevant = pool
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cosines, 'TILE', tile)
        check(retrieval_from_similarity(sim, owner), sim, owner)
        check(retrieval_from_similarity(sim, owner, relevant=relevant), sim, owner, relevant)


@quick
@given(pool=pools(), data=st.data())
def test_first_is_the_pool_cut_by_hand(pool, data):
    sim, owner, relevant = np.array(pool[0]), np.array(pool[1]), pool[2]
    n = data.draw(st.integers(1, sim.shape[1]))
    kept = np.flatnonzero(owner < n)
    cut = [{c for c in relevant[t] if c < n} for t in kept]
    r = retrieval_from_similarity(sim, owner, first=n, relevant=relevant)
    check(r, sim[kept, :n], owner[kept], cut)
    assert r.owner.tolist() == owner[kept].tolist()


@quick
@given(pool=pools(), seed=st.integers(0, 1000))
def test_without_ties_as_sorted_lists(pool, seed):
    "scikit-learn counts to the end of the list; for a smaller k, a walk down the sorted list."
    owner, relevant = pool[1:]
    T, C = len(owner), max(owner) + 1
    sim = np.random.default_rng(seed).permutation(T * C).reshape(T, C)
    right = np.array([[c == owner[t] or c in relevant[t] for c in range(C)] for t in range(T)])
    r = retrieval_from_similarity(sim, owner, relevant=relevant)
    for d, y, x in (('t2a', right, sim), ('a2t', right.T, sim.T)):
        whole = [average_precision_score(a, b) for a, b in zip(y, x)]
        assert r.average_precision(T * C, d) == pytest.approx(whole)
        for k in (1, 3, 10):
            hits = [a[np.argsort(-b)][:k] for a, b in zip(y, x)]
            walk = [sum(h[:i + 1].mean() for i in range(len(h)) if h[i]) for h in hits]
            assert r.average_precision(k, d) == pytest.approx(walk / np.minimum(k, y.sum(1)))


def test_five_captions_divide_by_five():
    "mAP@10 of audio-to-text as papers with five captions a clip compute it."
    owner = np.repeat(np.arange(40), 5)
    sim = np.random.default_rng(0).standard_normal((200, 40)) + 1.5 * (owner[:, None] == np.arange(40))
    found = []
    for c in range(40):
        rank = np.argsort(-sim[:, c]).argsort()[5 * c:5 * c + 5]
        inside = np.sort(rank[rank < 10]) + 1
        found.append((np.arange(1, len(inside) + 1) / inside).sum() / 5)
    assert retrieval_from_similarity(sim, owner).map(10, 'a2t') == pytest.approx(100 * np.mean(found))


# ---- own captions

def test_repeated_own_captions_are_not_counted():
    r = retrieval_from_similarity([[1, 0], [1, 0], [1, 0], [0, 1]], [0, 0, 0, 1])
    assert r.a2t_ranks.tolist() == [0, 0] and r.recall(1, 'a2t') == r.map(10, 'a2t') == 100
    e = np.eye(2)
    assert retrieval(e, e[[0, 0, 0, 1]], [0, 0, 0, 1]).a2t_ranks.tolist() == [0, 0]


def test_equal_captions_of_other_clips_count_half():
    sim = [[1, 0], [1, 0], [1, 0], [1, 0]]
    assert retrieval_from_similarity(sim, [0, 0, 0, 1]).a2t_ranks.tolist() == [.5, 1.5]
    assert retrieval_from_similarity(sim, [0, 0, 1, 1]).a2t_ranks.tolist() == [1, 1]


def test_equal_right_clips_are_not_counted():
    sim = [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert retrieval_from_similarity(sim, [0, 1, 2]).t2a_ranks.tolist() == [.5, 0, 0]
    r = retrieval_from_similarity(sim, [0, 1, 2], relevant=[[1], [], []])
    assert r.t2a_ranks.tolist() == [0, 0, 0] and r.a2t_ranks.tolist() == [0, 0, 0]
    assert r.average_precision(16, 't2a')[0] == 1


# ---- kinds of numbers

sim = np.array([[.9, .2, .3], [.8, .1, .5], [.7, .6, .6], [.1, .6, .4]])
owner = [0, 0, 1, 2]


@pytest.mark.parametrize('change', [
    lambda s: (10 * s).round().astype(np.int8), lambda s: (10 * s).round().astype(np.uint16),
    lambda s: (10 * s).round().astype(int) - 2**52, lambda s: torch.tensor((10 * s).round()).long(),
    lambda s: s.astype(np.float16), lambda s: torch.tensor(s).bfloat16(), lambda s: s.astype('>f4'),
    lambda s: s * 1e300, lambda s: s * 1e-300, lambda s: s[:, ::-1].copy()[:, ::-1],
    lambda s: s.tolist(), lambda s: torch.tensor(s, requires_grad=True)])
def test_types_of_similarities(change):
    assert retrieval_from_similarity(change(sim), owner).asdict() == retrieval_from_similarity(sim, owner).asdict()


def test_many_similarities_in_bf16_are_counted_exactly():
    S = (torch.from_numpy(np.random.default_rng(0).standard_normal((600, 600))) + 1.5 * torch.eye(600)).bfloat16()
    half, full = (retrieval_from_similarity(s, np.arange(600)) for s in (S, S.double()))
    for direction in ('t2a', 'a2t'):
        assert np.array_equal(half.ranks(direction), full.ranks(direction))
        assert half.map(10, direction) == full.map(10, direction)


def test_similarities_are_left_as_they_are():
    for s in (sim.copy(), torch.tensor(sim)):
        retrieval_from_similarity(s, owner)
        assert np.array_equal(s, sim)


@pytest.mark.parametrize('change', [1, 1e200])
@pytest.mark.parametrize('kind', [np.float32, np.float64, torch.float64])
def test_embeddings_are_left_as_they_are(kind, change):
    x = np.random.default_rng(0).standard_normal((30, 4))
    x = torch.tensor(x, dtype=kind) if kind is torch.float64 else x.astype(kind)
    x = x * change if x.itemsize == 8 else x
    same = x + 0
    first = retrieval(x[:10], x, np.arange(30) % 10)
    assert bool((x == same).all()) and first.asdict() == retrieval(x[:10], x, np.arange(30) % 10).asdict()


def test_read_only_and_reversed_embeddings():
    x = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    as_is = retrieval(x[:10], x, np.arange(30) % 10).asdict()
    for y in (x[:, ::-1], x.copy()):
        y.setflags(write=False)
        assert retrieval(y[:10], y, np.arange(30) % 10).asdict()['t2a'] == as_is['t2a']


def test_similarities_from_a_file_are_read_by_blocks(tmp_path):
    np.save(tmp_path/'sim.npy', sim)
    r = retrieval_from_similarity(np.load(tmp_path/'sim.npy', mmap_mode='r'), owner)
    assert r.asdict() == retrieval_from_similarity(sim, owner).asdict()


def test_infinite_similarities_are_ranked():
    s = np.where(np.arange(3) == np.array(owner)[:, None], sim, -np.inf)  # all others masked
    assert retrieval_from_similarity(s, owner).score == 100
    s = np.where(np.arange(3) != np.array(owner)[:, None], sim, -np.inf)  # the right clip masked
    check(retrieval_from_similarity(s, owner), s, owner)
    everything = retrieval_from_similarity(np.full((4, 3), -np.inf), owner)
    assert everything.t2a_ranks.tolist() == [1] * 4 and everything.a2t_ranks.tolist() == [1, 1.5, 1.5]
    check(retrieval_from_similarity(np.full((4, 3), np.inf), owner), np.full((4, 3), np.inf), owner)


def test_lengths_of_embeddings_do_not_matter():
    random = np.random.default_rng(0)
    audio, text, o = random.standard_normal((9, 4)), random.standard_normal((18, 4)), np.arange(18) % 9
    as_is = retrieval(audio, text, o)
    for a, t in ((1e200, 1e-200), (1e-300, 1e300)):
        assert retrieval(audio * a, text * t, o).asdict() == as_is.asdict()
    assert retrieval((100 * audio).astype(int), (100 * text).astype(np.int16), o).score == pytest.approx(as_is.score, abs=6)


def test_a_vector_of_zeros_ties_with_all():
    audio = np.eye(3); text = np.eye(3); text[1] = 0
    assert retrieval(audio, text, np.arange(3)).t2a_ranks.tolist() == [0, 1, 0]


@pytest.mark.parametrize('n', [1, 3])
def test_one_clip(n):
    r = retrieval_from_similarity(np.zeros((n, 1)), [0] * n)
    assert r.score == r.map(10, 't2a') == r.map(10, 'a2t') == 100 and r.medr == dict(t2a=1, a2t=1)
    assert interval(r) == (100, 100) and paired_test(r, r).p == 1


def test_embeddings_and_their_cosines_agree_on_sets():
    random = np.random.default_rng(1)
    audio, text, o = random.standard_normal((30, 8)), random.standard_normal((90, 8)), np.arange(90) % 30
    text[7:12] = text[3]; audio[4] = audio[9]
    u = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    sets = [random.choice(30, 3, replace=False) for _ in range(90)]
    a = retrieval(audio, text, o, first=20, relevant=sets)
    b = retrieval_from_similarity((u(text) @ u(audio).T).astype(np.float32), o, first=20, relevant=sets)
    assert all(np.array_equal(a.ranks(d), b.ranks(d)) for d in ('t2a', 'a2t'))
    assert a.asdict(ks=(2,), maps=(1, 16)) == b.asdict(ks=(2,), maps=(1, 16))


def close_embeddings(seed, d=300, C=70, change=3e-7):
    "Families of clips and captions that differ by so little that single precision cannot order them; and their owners."
    random = np.random.default_rng(seed)
    owner = np.sort(np.r_[np.arange(C), random.integers(0, C, 2 * C)])
    near = lambda x: x + change * random.standard_normal(x.shape)
    audio = near(random.standard_normal((C // 7, d))[np.arange(C) % (C // 7)])
    text = near(audio[owner] + .5 * random.standard_normal((C // 7, d))[owner % (C // 7)])
    text[5:9], audio[3] = text[4], audio[3 + C // 7]  # and some are equal
    return audio.astype(np.float32), text.astype(np.float32), owner


def in_double(audio, text):
    "Cosines in double precision, rounded to single precision."
    u = lambda x: x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    return (u(text) @ u(audio).T).astype(np.float32)


@pytest.mark.parametrize('tile', [16, 1024])
@pytest.mark.parametrize('seed', range(4))
def test_near_ties_have_the_ranks_of_double_precision(seed, tile, monkeypatch):
    monkeypatch.setattr(cosines, 'TILE', tile)
    audio, text, owner = close_embeddings(seed)
    fake = np.random.default_rng(seed).standard_normal((7 * len(audio), text.shape[1]))  # many others, far away
    for a, o in ((audio, owner), (np.r_[audio, fake], np.r_[owner, len(audio) + np.arange(len(fake))])):
        t = np.r_[text, fake][:len(o)]
        exact, r = retrieval_from_similarity(in_double(a, t), o), retrieval(a, t, o)
        assert all(np.array_equal(exact.ranks(d), r.ranks(d)) for d in ('t2a', 'a2t'))
        assert all(np.array_equal(x, y) for d in ('t2a', 'a2t') for x, y in zip(exact.places[d], r.places[d]))


def test_without_the_second_computation_near_ties_would_be_wrong(monkeypatch):
    audio, text, owner = close_embeddings(0)
    exact, product = retrieval_from_similarity(in_double(audio, text), owner), cosines.product
    monkeypatch.setattr(cosines.Cosines, 'in_double', lambda self, rows, cols: product(self.text.unit(rows), self.audio.unit(cols))[0])
    assert not np.array_equal(exact.t2a_ranks, retrieval(audio, text, owner).t2a_ranks)


@pytest.mark.parametrize('lower', [torch.bfloat16, torch.float16])
def test_a_product_in_lower_precision_is_noticed(lower, monkeypatch):
    "Some devices multiply float32 in a lower precision (TF32, or bf16 on CPUs)."
    random, product = np.random.default_rng(0), cosines.product
    owner = np.arange(300) % 100
    audio = random.standard_normal((100, 64)); text = audio[owner] + 3 * random.standard_normal((300, 64))
    exact = retrieval_from_similarity(in_double(audio, text), owner)
    monkeypatch.setattr(cosines, 'product', lambda a, b: (product(a.to(lower).float(), b.to(lower).float())[0], product(a, b)[1]))
    assert np.array_equal(exact.a2t_ranks, retrieval(audio, text, owner).a2t_ranks)


@pytest.mark.parametrize('kind', ['equal', 'random', 'one large', 'cancelling'])
def test_error_of_a_product_is_below_its_bound(kind):
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 3000)) * (0 if kind == 'equal' else 1) + (kind != 'random')
    if kind == 'one large': x[:, 7] = 100
    y = -x[:, ::-1] if kind == 'cancelling' else x
    x, y = (metrics._embeddings(np.ascontiguousarray(v.astype(np.float32)), 'x') for v in (x, y))
    S, margin = cosines.product(x.unit(slice(None)), y.unit(slice(None)))
    t, c = (i.flatten() for i in torch.meshgrid(torch.arange(200), torch.arange(200), indexing='ij'))
    assert (S.flatten() - cosines.pair_cosines(x, y, t, c)).abs().max() < margin < 1e-5


def test_autocast_changes_nothing():
    random = np.random.default_rng(0)
    x, y, owner = random.standard_normal((50, 64)), random.standard_normal((50, 64)), np.arange(50)
    with torch.autocast('cpu', torch.bfloat16): r = retrieval(x, y, owner)
    assert np.array_equal(r.t2a_ranks, retrieval(x, y, owner).t2a_ranks)


def test_memory_does_not_grow_with_the_pool():
    "16,000 x 16,000 similarities would be 1 GB; what is held on the way is a small part of it."
    code = """
import resource, numpy as np
from cmlf.metrics import retrieval
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
x, before = np.random.default_rng(0).standard_normal((16000, 8)), peak()
assert retrieval(x, x, np.arange(16000)).score == 100
print(peak() - before)
"""
    env = dict(os.environ, OMP_NUM_THREADS='1')
    found = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 350


# ---- what is refused

@pytest.mark.parametrize('call, message', [
    (lambda: retrieval_from_similarity([[1, 2], [3]], [0, 1]), 'different lengths'),
    (lambda: retrieval_from_similarity(sim.astype(complex), owner), 'complex128'),
    (lambda: retrieval_from_similarity(sim.astype(str), owner), 'should be real numbers'),
    (lambda: retrieval_from_similarity(np.full((4, 3), 2**53), owner), '2^53'),
    (lambda: retrieval_from_similarity(np.zeros((4, 0)), owner), '(4, 0)'),
    (lambda: retrieval(np.zeros((3, 0)), np.zeros((4, 0)), owner), '(3, 0)'),
    (lambda: retrieval_from_similarity(sim, owner, first=0), 'first=0'),
    (lambda: retrieval_from_similarity(sim, owner, first=1.5), 'first=1.5'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=[{0}] * 3), '3 sets for 4 captions'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=[{0}, {0}, {3}, {2}]), 'relevant[2] names clip 3'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=[{0}, {-1}, {1}, {2}]), 'relevant[1] names clip -1'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=owner), 'relevant[0] is 0'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=dict(enumerate([{0}] * 4))), 'relevant[0] is 0'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=sim > .5), 'should be a set of clip numbers'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=np.eye(4, 3, dtype=int)), 'should be a set'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=['0'] * 4), 'relevant[0] is 0'),
    (lambda: retrieval_from_similarity(sim, owner, relevant=[{.5}] * 4), 'relevant[0] is {0.5}'),
    (lambda: retrieval_from_similarity(sim, owner).recall(0, 't2a'), 'k=0'),
    (lambda: retrieval_from_similarity(sim, owner).map(-1, 't2a'), 'k=-1'),
    (lambda: retrieval_from_similarity(sim, owner).map(10, 'audio'), "unknown direction 'audio'"),
    (lambda: interval([]), 'no results'),
    (lambda: interval(retrieval_from_similarity(sim, owner), of='mAP'), "unknown metric 'mAP'"),
])
def test_refused(call, message):
    with pytest.raises(CmlfError) as e: call()
    assert message in str(e.value) and '\n' not in str(e.value)


def test_nan_is_named_by_its_caption_in_the_whole():
    s = np.random.default_rng(0).standard_normal((6, 3)); s[4, 0] = np.nan
    with pytest.raises(CmlfError, match='caption 4: its similarities hold NaN'):
        retrieval_from_similarity(s, [2, 2, 1, 0, 0, 1], first=2)  # the third of those left
    assert len(retrieval_from_similarity(s[:, ::-1], [2, 1, 1, 0, 0, 2], first=2).owner) == 4  # cut away


# ---- results

def test_a_retrieval_of_three_arrays_lacks_one_score():
    full = retrieval_from_similarity(sim, owner)
    r = Retrieval(full.t2a_ranks, full.a2t_ranks, full.owner)
    a, b = r.asdict(), full.asdict()
    assert a.pop('map') == dict(t2a=b['map']['t2a'], a2t={'mAP@10': None}) and b.pop('map') and a == b
    assert list(full.t2a) == list(full.a2t) == ['R@1', 'R@5', 'R@10']
    assert b['more'] == dict(t2a={'R@50': 100}, a2t={'R@50': 100})
    with pytest.raises(CmlfError, match='retrieval_from_similarity'): r.map(10, 'a2t')


def noisy(seed, noise=2, C=60):
    random = np.random.default_rng(seed)
    audio, o = random.standard_normal((C, 16)), np.repeat(np.arange(C), 3)
    return retrieval(audio, audio[o] + noise * random.standard_normal((3 * C, 16)), o)


def test_intervals_and_tests_of_map():
    good, weak = [noisy(i) for i in range(2)], [noisy(i, 5) for i in range(2)]
    for d in ('t2a', 'a2t'):
        mean = lambda rs: np.mean([r.map(10, d) for r in rs])
        low, high = interval(good, 10, d, of='map')
        assert low < mean(good) < high and interval(good, None, d, of='map') == (low, high)
        test = paired_test(good, weak, 10, d, draws=999, of='map')
        assert test.difference == pytest.approx(mean(good) - mean(weak)) and test.p < .01
    both = paired_test(good, weak, draws=99, of='map').difference
    assert both == pytest.approx(np.mean([paired_test(good, weak, 10, d, draws=99, of='map').difference
                                          for d in ('t2a', 'a2t')]))


# ---- ties on real captions

@pytest.fixture(scope='module')
def captions():
    "(captions, owner) of AudioCaps' test set."
    folder = os.environ.get('CMLF_AUDIOCAPS_CSV')
    if not folder: pytest.skip('CMLF_AUDIOCAPS_CSV is not set: the csv files of AudioCaps are not here')
    from cmlf.layouts import load_corpus
    test = load_corpus(folder, 10, audio=False).split('test')
    return np.array(test.captions), np.asarray(test.owner)


def test_equal_captions_of_audiocaps(captions):
    text, owner = captions
    clips = {}
    for t, c in zip(text, owner): clips.setdefault(t, set()).add(c)
    most = [max(np.unique(text[owner == c], return_counts=True)[1]) for c in range(957)]
    assert sum(len(clips[t]) > 1 for t in text) == 220
    assert sum(n >= 2 for n in most) == 96 and sum(n >= 3 for n in most) == 14


def made_up(text, owner, seed, noise=.079):
    "Similarities with a R@1 near 40: sums of a clip's captions, and noise on clips and wordings."
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    u = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    words, word = np.unique(text, return_inverse=True)
    tfidf = TfidfVectorizer(sublinear_tf=True).fit_transform(words)
    v, random = u(TruncatedSVD(256, random_state=0).fit_transform(tfidf)), np.random.default_rng(seed)
    blur = lambda x: u(x + noise * random.standard_normal(x.shape))
    clips = blur(u(np.stack([v[word[owner == c]].sum(0) for c in range(owner.max() + 1)])))
    return (blur(v)[word] @ clips.T).astype(np.float32)


def test_effect_of_the_rule_for_ties(captions):
    "The table of the page: differences in percentage points, means of five seeds."
    text, owner = captions
    own, rows = owner[:, None] == np.arange(957), []
    for seed in range(5):
        S = made_up(text, owner, seed)
        r, best = retrieval_from_similarity(S, owner), np.where(own, S, -np.inf).max(0)
        above, level = (S > best).sum(0), (S == best) & ~own
        repeated = ((S == best) & own).sum(0) - 1
        rules = above, above + level.sum(0) / 2, above + level.sum(0), above + (level.sum(0) + repeated) / 2
        assert np.array_equal(r.a2t_ranks, rules[1])
        mine = S[np.arange(len(S)), owner][:, None]
        strict = 100 * ((S > mine).sum(1) < 1).mean()  # a tied clip counts as first
        rows.append([r.t2a['R@1'], strict] + [100 * (x < k).mean() for k in (1, 10) for x in rules])
    t2a, strict, *a2t = np.mean(rows, 0)
    print(np.round([t2a, strict, *a2t], 2))
    assert t2a == pytest.approx(40, abs=1) and strict == pytest.approx(t2a, abs=.05)
    (up, half, down, before), (up10, half10, down10, before10) = a2t[:4], a2t[4:]
    assert half == pytest.approx(56.5, abs=1) and half10 == pytest.approx(95.8, abs=1)
    assert [up - half, down - half, before - half] == pytest.approx([1.2, -.7, -.4], abs=.15)
    assert [up10 - half10, down10 - half10, before10 - half10] == pytest.approx([.2, -.8, 0], abs=.15)
