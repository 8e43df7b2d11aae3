"Batches are a partition for every kind and size, bounds hold, and bad input gives one clear line."
import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cmlf import batches as objective
from cmlf.appendix import bounds, neighbours
from cmlf.batches import near_duplicates, largest_group, spread_groups, unit_vectors
from cmlf.core import KINDS, CmlfError, rng
from cmlf.mining import mine

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)


def vectors(n, d=5, seed=0, middle=.5):
    "Random vectors with a common mean, as real embeddings have."
    return unit_vectors(rng(seed, 'test', n, d).normal(size=(n, d)) + middle)


def clusters(n, d=16, topics=12, seed=0):
    "Vectors around a few topics."
    r = rng(seed, 'clusters', n, d)
    at = r.normal(size=(topics, d))[r.integers(topics, size=n)]
    return unit_vectors(at + .6 * r.normal(size=(n, d)))


def check_partition(found, n, b):
    assert found.batches.dtype == np.int64 and found.batches.shape == (n // b, b)
    assert len(found.dropped) == n % b and (np.diff(found.dropped) > 0).all()
    both = np.concatenate([found.batches.ravel(), found.dropped])
    assert sorted(both) == list(range(n))


def partitions(items, b):
    "Every way to cut `items` into batches of b."
    if not items: yield []
    for rest in itertools.combinations(items[1:], b - 1):
        left = [i for i in items[1:] if i not in rest]
        yield from ([[items[0], *rest], *p] for p in partitions(left, b))


def too_many(groups, batch, m):
    "Whether more than ceil(n / M) of a group of n share the batch."
    size, here = np.bincount(groups), np.bincount(groups[batch], minlength=max(groups) + 1)
    return (here > -(-size // m)).any()


def truth(x, b, groups=None):
    "Lowest and highest mean in-batch cosine of all partitions, of every choice of the dropped."
    n, w, values = len(x), (x @ x.T).double().numpy(), []
    for kept in itertools.combinations(range(n), n - n % b):
        for p in partitions(list(kept), b):
            if groups is not None and any(too_many(groups, some, n // b) for some in p): continue
            cos = [w[np.ix_(some, some)].sum() - np.trace(w[np.ix_(some, some)]) for some in p]
            values.append(sum(cos) / len(p) / b / (b - 1))
    return min(values), max(values)


# ---- every kind, every size

@quick
@given(n=st.integers(2, 70), b=st.integers(2, 9), kind=st.sampled_from(KINDS), seed=seeds)
def test_partition(n, b, kind, seed):
    if n < b: return
    found = mine(vectors(n, seed=seed), b, kind, seed=seed, sweeps=2)
    check_partition(found, n, b)
    x = torch.from_numpy(found.batches)
    assert found.mean_similarity == pytest.approx(objective.mean_similarity(found.vectors, x), abs=1e-6)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n, b', [(640, 32), (643, 32), (33, 32), (32, 32), (40, 2)])
def test_sizes(kind, n, b): check_partition(mine(clusters(n), b, kind, sweeps=3), n, b)


@pytest.mark.parametrize('kind', KINDS)
def test_same_seed_same_batches(kind):
    a, b = (mine(clusters(500), 16, kind, seed=3, epoch=1, sweeps=4) for _ in range(2))
    assert (a.batches == b.batches).all() and (a.dropped == b.dropped).all()


@pytest.mark.parametrize('kind', KINDS)
def test_seeds_differ(kind):
    a, b = (mine(clusters(500), 16, kind, seed=s, sweeps=4) for s in (0, 1))
    assert (a.batches != b.batches).any()


def mates(batches):
    "All pairs of batch-mates."
    return {p for some in batches.tolist() for p in itertools.combinations(sorted(some), 2)}


@pytest.mark.parametrize('kind', ['easy', 'hard'])
def test_epochs_differ_at_equal_quality(kind):
    x = clusters(800)
    found = [mine(x, 16, kind, epoch=k) for k in range(3)]
    quality = [f.mean_similarity for f in found]
    span = abs(mine(x, 16, 'random').mean_similarity - np.mean(quality))
    assert max(quality) - min(quality) < .03 * span
    shared = [len(mates(found[0].batches) & mates(f.batches)) / len(mates(f.batches)) for f in found[1:]]
    assert max(shared) < .8


def rotated(x, seed=0):
    "`x`, rotated."
    q = np.linalg.qr(rng(seed, 'turn').normal(size=(x.shape[1],) * 2))[0]
    return (x.double() @ torch.from_numpy(q)).float()


@pytest.mark.parametrize('kind', KINDS)
def test_rotation(kind):
    x = clusters(480)
    a, b = (mine(v, 16, kind, sweeps=6) for v in (x, rotated(x)))
    near = abs(a.mean_similarity - b.mean_similarity)
    assert near < .005 # only ties may be decided by rounding
    if kind == 'random': assert (a.batches == b.batches).all()


@quick
@given(seed=seeds, kind=st.sampled_from(KINDS))
def test_length_and_container_do_not_matter(seed, kind):
    x = vectors(40, seed=seed)
    long = x.double().numpy() * 4.
    assert (mine(x, 8, kind, sweeps=2).batches == mine(long, 8, kind, sweeps=2).batches).all()


def test_kinds_in_order():
    x = clusters(800)
    easy, random, hard = (mine(x, 16, k).mean_similarity for k in ('easy', 'random', 'hard'))
    assert easy < random < hard
    median = mine(x, 16, 'median')
    middle = float((x @ x.T).median())
    off = lambda f: float(((cos(f, x) - middle) ** 2).mean())
    assert off(median) < off(mine(x, 16, 'random'))


def cos(found, x):
    "All cosines inside batches."
    v = x[torch.from_numpy(found.batches)]
    return (v @ v.transpose(1, 2))[:, ~torch.eye(v.shape[1], dtype=bool)]


@pytest.mark.parametrize('kind', ['easy', 'hard'])
def test_more_sweeps_are_not_worse(kind):
    x, sign = clusters(600), 1 if kind == 'hard' else -1
    none, some = (sign * mine(x, 12, kind, sweeps=s).mean_similarity for s in (0, 8))
    assert some > none


# ---- groups

@quick
@given(seed=seeds, kind=st.sampled_from(KINDS), n=st.integers(24, 90), b=st.integers(2, 8))
def test_groups_never_meet(seed, kind, n, b):
    r, m = rng(seed, 'groups', n, b), n // b
    groups = np.repeat(np.arange(n), r.integers(1, m + 1, n))[:n]
    groups = 7 * r.permutation(groups) - 100 # any whole numbers
    found = mine(vectors(n, seed=seed), b, kind, groups=groups, sweeps=2)
    check_partition(found, n, b)
    assert all(len(set(groups[some])) == b for some in found.batches)


@pytest.mark.parametrize('kind', KINDS)
def test_groups_of_maximal_size(kind):
    groups = np.repeat(np.arange(8), 10) # one of each in every batch
    found = mine(clusters(80), 8, kind, groups=groups, sweeps=3)
    assert (np.sort(groups[found.batches], 1) == np.arange(8)).all()


def test_groups_cost_little():
    x = clusters(800)
    groups = np.arange(800) // 2
    free, apart = (mine(x, 16, 'hard', groups=g).mean_similarity for g in (None, groups))
    assert apart > free - .05


def classes(n, k, seed):
    "Labels of k classes, of uneven size."
    r = rng(seed, 'classes', n, k)
    return r.choice(k, n, p=r.dirichlet(np.ones(k)))


def check_spread(found, groups, n, b):
    check_partition(found, n, b)
    groups, m = np.unique(groups, return_inverse=True)[1], n // b
    assert not any(too_many(groups, some, m) for some in found.batches)
    assert found.spread == (np.bincount(groups) > m).sum()
    assert found.summary(bound=False).get('spread', 0) == found.spread


@settings(max_examples=80, deadline=None)
@given(seed=seeds, kind=st.sampled_from(KINDS), n=st.integers(2, 70), b=st.integers(2, 12), k=st.integers(1, 6),
       equal=st.booleans())
def test_large_groups_are_spread(seed, kind, n, b, k, equal):
    if n < b: return
    groups = classes(n, k, seed)
    x = vectors(k, seed=seed)[groups] if equal else vectors(n, seed=seed)
    found = mine(x, b, kind, groups=5 * groups - 7, seed=seed, sweeps=2)
    check_spread(found, groups, n, b)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n, b, size', [
    (40, 8, [40]), (43, 8, [43]), (16, 16, [16]), (17, 16, [9, 8]), (33, 16, [33]), (39, 16, [20, 18, 1]),
    (64, 8, [16] * 4), (64, 32, [32, 32]), (63, 8, [30, 20, 10, 3]), (64, 2, [63, 1]), (90, 9, [11] * 8 + [2])])
def test_extreme_groups(kind, n, b, size):
    groups = np.repeat(np.arange(len(size)), size)
    for x in (clusters(n), clusters(len(size))[groups]): # also with equal vectors in each group
        check_spread(mine(x, b, kind, groups=groups, sweeps=3), groups, n, b)


def test_four_names_for_64_clips():
    groups = np.arange(64) % 4
    x = clusters(64)
    for kind in KINDS:
        found = mine(x, 8, kind, groups=groups)
        assert found.spread == 4 and (np.sort(groups[found.batches], 1) == np.repeat(np.arange(4), 2)).all()
    a, b, other = (mine(x, 8, 'hard', groups=groups, seed=s).batches for s in (0, 0, 1))
    assert (a == b).all() and (a != other).any()


def test_groups_that_fit_are_left_alone():
    labels = torch.from_numpy(classes(60, 9, 0))
    most = int(labels.bincount().max())
    assert spread_groups(labels, most, rng(0)) is labels
    parts = spread_groups(labels, 4, rng(0))
    assert parts.bincount().max() <= 4 and len(parts.unique()) == (-(-labels.bincount() // 4)).sum()
    pairs = torch.stack([labels, parts], 1).unique(dim=0)
    assert len(pairs) == len(parts.unique()) # every part is of one group
    found = mine(clusters(60), 10, 'easy', groups=np.arange(60) // 2)
    assert found.spread == 0 and 'spread' not in found.summary()


@pytest.mark.parametrize('n, b', [(8, 2), (8, 4), (9, 4), (10, 3)])
def test_bounds_hold_for_spread_groups(n, b):
    for seed in range(6):
        x, groups = vectors(n, 3, seed), np.minimum(rng(seed, 'large').permutation(n) // 2, 1)
        lowest, highest = truth(x, b, groups)
        hard, easy = mine(x, b, 'hard', groups=groups), mine(x, b, 'easy', groups=groups)
        assert hard.spread and hard.mean_similarity < highest + 1e-6 < hard.bound + 2e-6
        assert easy.spread and easy.mean_similarity > lowest - 1e-6 > easy.bound - 2e-6
        assert hard.bound_is == 'proof'


def test_pairs_that_never_meet_are_not_listed(monkeypatch):
    x, groups = clusters(60, seed=1)[np.arange(600) % 60], np.arange(600) % 60 # each ten times
    u = torch.full((600,), .4)
    pairs = bounds.close_pairs(x, u, 0., torch.from_numpy(groups))
    assert len(pairs) < len(bounds.close_pairs(x, u, 0.))
    assert (groups[pairs // 600] != groups[pairs % 600]).all()
    found = mine(x, 10, 'hard', groups=groups, sweeps=2)
    assert found.mean_similarity < found.bound < 1


class NoValues:
    "A tensor without values: any cosine would raise an error."
    new_zeros = staticmethod(torch.zeros)


def test_random_batches_in_tight_groups_take_no_cosines():
    groups = np.repeat(np.arange(36), 100)
    batches = torch.from_numpy(rng(0, 'tight').permutation(3600)[:3584]).view(112, 32)
    task = objective.Task(NoValues(), 112, 32, torch.from_numpy(groups), rng(0), torch.zeros_like, 0)
    objective.separate(task, batches)
    assert not any(too_many(groups, some, 112) for some in batches.numpy()) and len(batches.unique()) == 3584


def test_batches_do_not_depend_on_bf16(monkeypatch):
    x, found = clusters(4200, 64), []
    for low in (False, True):
        monkeypatch.setenv('CMLF_BF16', str(int(low)))
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(avx512_bf16=low))
        found.append(mine(x, 32, 'hard', sweeps=3))
    assert (found[0].batches == found[1].batches).all()


# ---- near duplicates

def by_definition(x, threshold, groups):
    "Connected components of the graph of close pairs and groups, by smallest label."
    a, b = ((x @ x.T) >= threshold).numpy().nonzero()
    _, label = np.unique(groups, return_inverse=True)
    graph = coo_matrix((np.ones(len(a)), (label[a], label[b])), shape=(len(x), len(x)))
    return np.unique(connected_components(graph, directed=False)[1][label], return_inverse=True)[1]


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(1, 300), d=st.integers(1, 6), threshold=st.floats(-1, 1),
       most=st.sampled_from([0, 1, 20, 2**20]), grouped=st.booleans())
def test_near_duplicates_by_definition(seed, n, d, threshold, most, grouped):
    x = vectors(n, d, seed)
    groups = rng(seed, 'g').integers(n, size=n) if grouped else np.arange(n)
    label = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    joined = objective._joined(x, threshold, label, most).unique(return_inverse=True)[1].numpy()
    expected = by_definition(x, threshold, groups)
    assert (joined == expected).all()
    labels = near_duplicates(x, threshold, groups - 5)
    assert (labels == by_definition(unit_vectors(x), threshold, groups)).all()


def test_near_duplicates_across_tiles():
    x = torch.cat([clusters(9000, seed=1), vectors(100, 16)])
    x = x[torch.from_numpy(rng(0, 'mixed').permutation(9100))]
    x = unit_vectors(x)
    assert (near_duplicates(x, .93) == by_definition(x, .93, np.arange(9100))).all()


def test_near_duplicates_along_a_path():
    a = np.linspace(0, 3, 3000)[rng(0, 'path').permutation(3000)]
    x = np.stack([np.cos(a), np.sin(a)], 1)
    assert largest_group(near_duplicates(x, .99999)) == 3000 # each is near only to the next


MEMORY = """
import resource, numpy as np
from cmlf.mining import near_duplicates
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
x = 1 + .001 * np.random.default_rng(0).normal(size=(8000, 8))
near_duplicates(x[:100], .9)
before = peak()
assert (near_duplicates(x, .9) == 0).all()
print(peak() - before)
"""

def test_memory_does_not_grow_with_the_number_of_pairs():
    done = subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < .4 # GB; all 32 million pairs would take more than 1


def test_one_group_of_all_vectors(capsys):
    x = clusters(300)
    labels = near_duplicates(x, -1)
    assert largest_group(labels) == 300
    assert mine(x, 10, 'hard', groups=labels, sweeps=2).spread == 1 and not capsys.readouterr().err


def test_near_duplicates():
    x = clusters(300)
    x = torch.cat([x, x[:40] + 1e-4])
    labels = near_duplicates(x, .999)
    assert (labels[:40] == labels[300:]).all() and labels.dtype == np.int64
    joined = near_duplicates(x, .999, np.arange(340) // 2)
    assert all(joined[2 * i] == joined[2 * i + 1] for i in range(170))


# ---- where the truth is known

@pytest.mark.parametrize('n, b', [(8, 2), (8, 4), (12, 3), (12, 4), (12, 6), (9, 4), (11, 5)])
def test_brute_force(n, b):
    for seed in range(3):
        x = vectors(n, 3, seed)
        lowest, highest = truth(x, b)
        hard, easy = mine(x, b, 'hard', seed=seed), mine(x, b, 'easy', seed=seed)
        assert highest - .05 < hard.mean_similarity < highest + 1e-6 < hard.bound + 2e-6
        assert lowest + .05 > easy.mean_similarity > lowest - 1e-6 > easy.bound - 2e-6


@pytest.mark.parametrize('n, b', [(8, 2), (8, 4), (9, 4), (10, 3)])
def test_brute_force_with_groups(n, b):
    for seed in range(3):
        x, groups = vectors(n, 3, seed), rng(seed, 'pairs').permutation(n) // 2
        lowest, highest = truth(x, b, groups)
        hard, easy = mine(x, b, 'hard', groups=groups), mine(x, b, 'easy', groups=groups)
        assert highest - .08 < hard.mean_similarity < highest + 1e-6 < hard.bound + 2e-6
        assert lowest + .08 > easy.mean_similarity > lowest - 1e-6 > easy.bound - 2e-6


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(4, 9), b=st.integers(2, 4), middle=st.sampled_from([-.5, 0., .5, 3.]))
def test_no_partition_beats_a_bound(seed, n, b, middle):
    x = vectors(n, 3, seed, middle)
    lowest, highest = truth(x, b)
    u = torch.from_numpy(rng(seed, 'prices').normal(size=n) / 3).float()
    assert objective.easy_bound(x, n // b, b) <= lowest + 1e-6
    assert bounds.dual_value(x, u, n // b, b) >= highest - 1e-6 # any u will do
    assert bounds.hard_bound(x, n // b, b) >= highest - 1e-6


# ---- the bound on larger sets

@pytest.mark.parametrize('n, b', [(600, 12), (605, 12), (400, 50)])
@pytest.mark.parametrize('grouped', [False, True])
def test_value_of_the_active_set_is_the_bound(n, b, grouped):
    x, m = clusters(n), n // b
    groups = torch.from_numpy(rng(0, 'g').integers(0, n // 3, n)) if grouped else None
    p = bounds.first_dual(x, m, b, groups)
    for _ in bounds.falling_bounds(p, 0):
        assert p.value() == pytest.approx(bounds.dual_value(x, p.u, m, b, groups), abs=2e-6)
    for _ in bounds.falling_bounds(p, 2): assert p.multiplier.numel() == 0 or p.multiplier.min() >= 0
    assert p.value() == pytest.approx(written_out(p), abs=2e-6)


def written_out(p):
    "D(u, multipliers) over all pairs, as in its formula."
    over = (p.x @ p.x.T - p.u - p.u[:, None]).double()
    for (j, i, k), value in zip(p.triangles.T.tolist(), p.multiplier.tolist()):
        for a, c, sign in ((j, i, -1), (j, k, -1), (i, k, 1)): over[min(a, c), max(a, c)] += sign * value
    if p.groups is not None: over[p.groups[:, None] == p.groups] = 0
    size = p.m * p.b
    fixed = (p.b - 1) * p.u.double().topk(size).values.sum() + p.multiplier.double().sum()
    return float(fixed + over.triu(1).clamp_min(0).sum()) * 2 / size / (p.b - 1)


def test_bounds_are_ordered():
    x = clusters(600)
    w = (x @ x.T).fill_diagonal_(-2).topk(11).values
    nearest, half = float(w.mean()), bounds.dual_value(x, w[:, -1] / 2, 50, 12)
    degrees, triangles = (bounds.hard_bound(x, 50, 12, rounds=k) for k in (0, 5))
    assert mine(x, 12, 'hard').mean_similarity <= triangles < degrees <= half <= nearest + 1e-6
    assert bounds.sampled_bound(x, 50, 12, rows=300) >= degrees - 1e-3


def test_known_optimum():
    x = unit_vectors(np.repeat(np.eye(10), 8, 0)) # ten topics of eight: hard batches of 8 are the topics
    found = mine(x, 8, 'hard')
    assert found.mean_similarity == pytest.approx(1) and found.bound == pytest.approx(1) and found.gap < 1e-6
    easy = mine(x, 10, 'easy') # and easy batches of 10 have one of each
    assert easy.mean_similarity == pytest.approx(0, abs=1e-6) and easy.gap < 1e-6


def test_summary_is_json():
    import json
    for kind in KINDS:
        s = json.loads(json.dumps(mine(clusters(100), 8, kind, sweeps=1).summary()))
        assert s['batches'] == 12 and s['dropped'] == 4 and (s['bound'] is None) == (kind in ('random', 'median'))


# ---- bad input

good = vectors(40)
not_a_number = good.clone(); not_a_number[7, 1] = torch.nan
infinite = good.clone(); infinite[8, 0] = torch.inf
zero = good.clone(); zero[9] = 0

@pytest.mark.parametrize('x, settings, message', [
    (not_a_number, {}, 'vector 7 of 40 is not finite'),
    (infinite, {}, 'vector 8 of 40 is not finite'),
    (zero, {}, 'vector 9 of 40 is all zeros'),
    (good[:5], {}, '5 vectors do not fill a batch of 8: give more, or a smaller batch_size (--batch-size)'),
    (good[0], {}, 'shape'),
    (good[None], {}, 'shape'),
    (good[:, :0], {}, 'shape'),
    ([['a', 'b']], {}, 'should be an (N, d) array of numbers'),
    (None, {}, 'vectors'),
    (good, dict(kind='hrad'), "did you mean 'hard'"),
    (good, dict(kind=None), 'unknown kind'),
    (good, dict(batch_size=1), 'batch_size=1'),
    (good, dict(batch_size=8.), 'batch_size=8.0'),
    (good, dict(batch_size=True), 'batch_size=True'),
    (good, dict(sweeps=-1), 'sweeps=-1'),
    (good, dict(sweeps=1.5), 'sweeps=1.5'),
    (good, dict(sweeps='ten'), "sweeps='ten'"),
    (good, dict(groups=np.arange(39)), 'groups of shape'),
    (good, dict(groups=np.arange(40)[:, None]), 'groups of shape'),
    (good, dict(groups=np.arange(40) / 2), 'groups of type float64'),
    (good, dict(groups=['a'] * 40), 'groups of type'),
    (good, dict(groups=[[0], [1, 2]] * 20), 'one whole number for each vector'),
    (good, dict(seed='a'), "seed='a'"),
    (good, dict(epoch=1.5), 'epoch=1.5'),
])
def test_bad_input(x, settings, message):
    with pytest.raises(CmlfError) as error: mine(x, **dict(dict(batch_size=8, kind='hard'), **settings))
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('groups', [np.arange(39), np.arange(40) / 2, ['a'] * 40, [[0], [1, 2]] * 20])
def test_groups_are_refused_for_all_readers(groups):
    for ask in (lambda: mine(good, 8, 'hard', groups=groups), lambda: near_duplicates(good, .9, groups)):
        with pytest.raises(CmlfError, match=r'or no groups \(--groups\)') as error: ask()
        assert 'None' not in str(error.value)


def test_a_tree_of_many_uses_their_pca_projection():
    x = clusters(5000, 96)
    assert neighbours.pca_projection(x).shape == (5000, 64)
    few = x[:4000]
    assert neighbours.pca_projection(few) is few # few vectors as they are
    order = torch.arange(4992)
    tree = neighbours.bisect(x, order, 32).view(-1, 32)
    assert sorted(tree.flatten().tolist()) == order.tolist()
    full, flat = objective.mean_similarity(x, tree), objective.mean_similarity(x, order.view(-1, 32))
    assert full > flat + .1
    a, b = (mine(v, 16, 'hard', sweeps=0) for v in (x, rotated(x)))
    assert abs(a.mean_similarity - b.mean_similarity) < 5e-3 # rounding decides at every fork


def test_mined_batches_are_leaves_for_the_bound():
    x = clusters(6010, 64)
    found = mine(x, 32, 'hard', sweeps=10)
    leaves = found.leaves()
    assert leaves.shape == (188, 32) and len(leaves.unique()) == 6010
    true = (x @ x.T).fill_diagonal_(-2).topk(31).values
    cosine, index = neighbours.neighbours(x, 31, leaves, per=8, width=64)
    assert (cosine <= true + 1e-5).all() and (cosine - true).mean() > -.005
    assert torch.allclose((x.unsqueeze(1) * x[index]).sum(2), cosine, atol=1e-5)
    tight = bounds.sampled_bound(x, *found.batches.shape, leaves=leaves, rows=2000)
    assert found.mean_similarity < tight < float(true.mean()) + .01


def test_rounds_of_the_bound():
    x = clusters(600)
    quick, full = (mine(x, 12, 'hard', sweeps=2, rounds=r) for r in (0, 5))
    assert (quick.batches == full.batches).all() and full.bound < quick.bound < 1
    with pytest.raises(CmlfError, match='rounds=-1'): mine(x, 12, 'hard', rounds=-1)


@pytest.mark.parametrize('seed', range(6))
def test_equal_vectors_in_groups_stay_a_partition(seed):
    r = rng(seed, 'equal')
    x = r.normal(size=(17, 16))[r.integers(0, 17, 50)] + .5
    groups = np.arange(50) // 3
    found = mine(x, 16, 'easy', groups=groups, sweeps=2, seed=seed)
    check_partition(found, 50, 16)
    assert all(len(np.unique(g)) == 16 for g in groups[found.batches])


def test_rounding_hides_no_pair():
    "64 vectors whose bf16 cosines are all too low by .0076."
    parts = np.array([.5] * 3 + [.25] * 3 + [.125] * 3 + [.0625] * 2) * (1 + 2**-8 - 2**-14)
    x = unit_vectors(np.repeat(np.r_[parts, max(0, 1 - (parts**2).sum())**.5][None], 64, 0))
    u = torch.full((64,), .5087)
    assert len(bounds.close_pairs(x, u, .02)) == 64 * 63 // 2


def test_too_dense_for_a_proof(monkeypatch):
    found = mine(clusters(5000), 32, 'hard', sweeps=2, rounds=0)
    proof = found.bound
    assert found.bound_is == 'proof'
    monkeypatch.setattr(bounds, 'MAX_PAIRS', 1000)
    assert bounds.hard_bound(found.vectors, *found.batches.shape) is None
    again = mine(clusters(5000), 32, 'hard', sweeps=2, rounds=0)
    assert again.bound_is == 'estimate' == again.summary()['bound_is'] and abs(again.bound - proof) < .02


def test_many_dropped():
    x = clusters(1999)
    some, none = (mine(x, 1000, 'hard', sweeps=s) for s in (2, 1))
    check_partition(some, 1999, 1000)
    assert some.mean_similarity > none.mean_similarity


@pytest.mark.parametrize('table', [
    lambda x: pd.DataFrame(x), lambda x: x[::-1][::-1], lambda x: x.astype('>f4'), lambda x: x.astype(object),
    lambda x: x.tolist(), lambda x: x * 1e300, lambda x: x * 1e-300, lambda x: torch.from_numpy(x)])
def test_arrays_of_any_type(table):
    x = rng(0, 'makes').normal(size=(40, 5))
    assert torch.allclose(unit_vectors(table(x)), unit_vectors(x), atol=1e-5)


@pytest.mark.parametrize('threshold', [2, 'x', float('nan'), None, True])
def test_bad_threshold(threshold):
    with pytest.raises(CmlfError, match='should be a cosine'): near_duplicates(clusters(20), threshold)


@pytest.mark.parametrize('threshold', [1, np.float32(.5), np.float64(.5)])
def test_thresholds_of_any_type(threshold): assert len(near_duplicates(clusters(20), threshold)) == 20


# ---- the active set is complete

@settings(max_examples=30, deadline=None)
@given(seed=seeds, slacks=st.lists(st.sampled_from([.02, .05, .1, .3]), min_size=2, max_size=5),
       fall=st.sampled_from([.005, .03, .2]), share=st.sampled_from([0., .04, 1.]), few=st.booleans(), grouped=st.booleans())
def test_lists_of_pairs_are_complete(seed, slacks, fall, share, few, grouped):
    "However u moves between two lists, and whether or not a long list fits into memory."
    r, n = rng(seed, 'lists'), 90
    x = clusters(n)
    groups = torch.from_numpy(r.integers(0, n // 3, n)) if grouped else None
    p = bounds.first_dual(x, n // 6, 6, groups)
    allowed = torch.ones(n, n).triu(1) > 0
    if grouped: allowed &= groups[:, None] != groups
    with pytest.MonkeyPatch.context() as m:
        if few: m.setattr(bounds, 'MAX_PAIRS', 0)
        for slack in slacks:
            i, j = torch.where(allowed & (x @ x.T - p.u - p.u[:, None] > -slack))
            assert torch.isin(i * n + j, bounds.list_pairs(p, slack)).all()
            p.u = p.u - torch.from_numpy(fall * r.uniform(-1, 1, n) * (r.random(n) < share)).float()


def test_one_pass_over_all_pairs_is_enough_for_small_changes(monkeypatch):
    passes, close_pairs = [], bounds.close_pairs
    monkeypatch.setattr(bounds, 'close_pairs', lambda *given: passes.append(1) or close_pairs(*given))
    p = bounds.first_dual(clusters(600), 50, 12)
    for _ in range(3):
        bounds.renew_active(p, .02)
        p.u = p.u - .01
    assert len(passes) == 1
    p.u = p.u - .1
    bounds.renew_active(p, .02)
    assert len(passes) == 2
