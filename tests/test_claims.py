"Variants of stage 3, runs that start from stage 2, ranks in files, claims with seeds."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import cmlf.appendix.choices as choices_page
from cmlf.appendix.choices import claims_needed, size_ways
from cmlf.appendix.claims_page import ClaimsReport
from cmlf.appendix.comparisons import (COMPARISONS, VARIANTS, Point, measured, points_of, sources_of, specs_of,
                                       test_comparisons as compare, variant_point)
from cmlf.appendix.effects import effect, shared, simulate, verdict
from cmlf.config import get_profile
from cmlf.core import CmlfError, read_json, rng
from cmlf.experiments import Experiment
from cmlf.mining import mine
from cmlf.runs import RankRun, is_done, is_known
from command import cmlf

@pytest.fixture(scope='module')
def exp(tmp_path_factory):
    folder = tmp_path_factory.mktemp('claims')
    made = Experiment(get_profile('smoke'), folder/'runs', keep=folder/'ranks')
    made.train_all([p.spec(made, 0) for p in (Point('3cmlf', chm=True), variant_point('hard, as the paper'), variant_point(''))])
    return made

# --- runs that start from stage 2

def test_stage_3_alone_is_the_third_stage_of_a_whole_run(exp):
    whole, part = (exp.run(p.spec(exp, 0)) for p in (Point('3cmlf', chm=True), variant_point('hard, as the paper')))
    for key in ('audio_3', 'text_3'): assert np.array_equal(whole.arrays[key], part.arrays[key])
    pd.testing.assert_frame_equal(whole.history.drop(columns=['seconds', 'val_seconds']), part.history.drop(columns=['seconds', 'val_seconds']))
    for key in ('test', 'selected', 'val', 'last_val', 'stages'): assert whole.metadata[key] == part.metadata[key]
    assert whole.updates() == part.updates()

def test_a_change_of_stage_3_leaves_its_start_as_it_is(exp):
    specs = [variant_point(n).spec(exp, 0) for n in ('', 'BatchNorm fixed', 'half of the batches')]
    starts = [next(p for p in exp.parents(s) if p.system == 'stages12') for s in specs]
    assert len({exp.key(s) for s in starts}) == 1 and len({exp.key(s) for s in specs}) == 3

def test_a_change_to_the_default_is_no_change(exp):
    plain, same = (exp.spec('3cmlf', 'scratch', True, changes=c) for c in ('', 'last_rate=1.0 mined_share=1'))
    assert exp.key(plain) == exp.key(same)

@pytest.mark.parametrize('changes,words', [('nieghbours=4', "did you mean 'neighbours'"), ('n_train=9', 'belongs to the corpus'),
                                           ('neighbours=3', 'should divide batch_size'), ('last_rate=0', 'above zero')])
def test_a_wrong_change_is_one_clear_error(exp, changes, words):
    with pytest.raises(CmlfError, match=words): exp.key(exp.spec('3cmlf', 'scratch', True, changes=changes))

@pytest.mark.parametrize('name', [n for n in VARIANTS if n != 'hard, as the paper' and 'groups' not in n])
def test_every_variant_trains(exp, name):
    run = exp.run(variant_point(name).spec(exp, 0))
    assert np.isfinite(run.arrays['audio_3']).all() and run.metadata['stages'] == 3

def test_fixed_batchnorm_keeps_its_statistics(exp):
    from safetensors.torch import load_file
    runs = {n: exp.run(variant_point(n).spec(exp, 0)) for n in ('BatchNorm fixed', '')}
    start = load_file(exp.start(variant_point('').spec(exp, 0)).folder/'model.safetensors')
    # with `keep_start` a stage may return its start: then nothing at all has changed
    weights = load_file(runs['BatchNorm fixed'].folder/'model.safetensors')
    assert all(torch.equal(weights[k], v) for k, v in start.items() if 'running_' in k)

# --- ranks

def test_ranks_are_kept_when_a_run_ends_and_complete_a_report_elsewhere(exp, tmp_path):
    spec = variant_point('').spec(exp, 0)
    other = Experiment(exp.profile, tmp_path/'runs', ranks=exp.keep, only='nothing')
    assert is_known(other, spec) and not is_done(other, spec)
    mine_, theirs = other.result(spec), exp.run(spec)
    assert isinstance(mine_, RankRun)
    for stage, last in ((3, False), (3, True)):
        a, b = (r.retrieval(stage, last=last) for r in (mine_, theirs))
        assert a.asdict() == b.asdict()
    pair = [(variant_point(''), variant_point('hard, as the paper'))]
    a, b = (measured(e, pair, 1) for e in (other, exp))
    assert (a.value, a.low, a.high, a.p) == (b.value, b.low, b.high, b.p)

def test_ranks_never_count_unless_they_are_asked_for(exp, tmp_path):
    spec = variant_point('').spec(exp, 0)
    assert not is_known(Experiment(exp.profile, tmp_path/'runs', keep=exp.keep), spec)

def test_a_missing_folder_of_ranks_is_refused(tmp_path):
    done = cmlf('reproduce', '--profile', 'smoke', '--ranks', tmp_path/'nowhere', '--plan')
    assert done.returncode == 2 and 'no such folder of ranks' in done.stderr

# --- mixtures

@pytest.fixture(scope='module')
def vectors(): return rng(0, 'vectors').normal(size=(300, 12))

@pytest.mark.parametrize('how', [dict(neighbours=4), dict(neighbours=8, skip=5), dict(skip=12), dict(share=.5), dict(neighbours=1),
                                 dict(drop='random'), dict(neighbours=2, share=.3, drop='random')])
@pytest.mark.parametrize('grouped', [False, True])
def test_every_mixture_is_a_partition_that_keeps_groups_apart(vectors, how, grouped):
    groups = np.arange(300) // 2 if grouped else None
    found = mine(vectors, 16, 'hard', groups=groups, **how)
    assert found.batches.shape == (18, 16)
    assert sorted([*found.batches.ravel(), *found.dropped]) == list(range(300))
    if grouped: assert all(len(set(groups[b])) == 16 for b in found.batches)
    again = mine(vectors, 16, 'hard', groups=groups, **how)
    assert (found.batches == again.batches).all()
    assert found.mean_similarity <= found.bound

def test_smaller_groups_are_less_hard(vectors):
    hard = [mine(vectors, 16, 'hard', neighbours=k).mean_similarity for k in (1, 2, 4, 8, 0)]
    assert hard == sorted(hard)

def test_the_band_keeps_the_nearest_out(vectors):
    x = torch.nn.functional.normalize(torch.tensor(vectors), dim=1)
    order = (x @ x.T).fill_diagonal_(-9).argsort(1, descending=True)[:, :10].numpy()
    def share(found): # of members that have one of their ten nearest in their group of 8
        return np.mean([bool(set(order[i]) & set(g)) for g in found.batches.reshape(-1, 8) for i in g])
    without, band = (mine(vectors, 16, 'hard', neighbours=8, skip=s) for s in (0, 10))
    assert share(without) > .8 and share(band) < .25

# --- effects

def test_an_effect_without_variation_between_seeds_or_clips_is_exact():
    found = effect(np.full((3, 10), .2))
    assert found.value == pytest.approx(2) and found.low == pytest.approx(2) == found.high

def test_more_shared_sources_widen_the_interval():
    d, sources = simulate(1., rng(0, 'test'), sd=(1., 1., .1, 2.))
    one = effect(d), effect(d, sources), effect(d, [[f's{i}'] for i in range(len(sources))])
    assert one[1].sd_clips > one[0].sd_clips == pytest.approx(one[2].sd_clips)

def test_no_effect_is_called_one_at_the_nominal_rate():
    draw = rng(1, 'nominal')
    said = [verdict(effect(*simulate(0., draw))) for _ in range(400)]
    assert said.count('cannot tell') > .92 * 400

def test_claims_of_one_seed_cannot_tell(exp):
    frame = compare(exp, 1, [replace(COMPARISONS[0], pairs=((variant_point(''), variant_point('hard, as the paper')),))])
    assert frame.verdict.tolist() == ['cannot tell'] and frame.seeds.tolist() == [1]

def test_scenes_know_their_sources(exp):
    sources = sources_of(exp)
    assert len(sources) == len(exp.corpus.split('test')) and all(sources)
    assert shared(sources).shape == (len(sources),) * 2

# --- the gap to the paper

def test_a_run_on_another_corpus_is_not_compared_with_the_paper(exp):
    done = cmlf('doctor', '--run', exp.run(exp.spec('baseline', 'scratch')).folder)
    assert done.returncode == 2 and 'not on AudioCaps' in done.stderr and 'Traceback' not in done.stderr

# --- the page, by papermill

def test_claims_are_tested_from_ranks_alone(exp, tmp_path):
    done = cmlf('reproduce', '--profile', 'smoke', '--tables', 'claims', '--runs', tmp_path/'runs', '--out', tmp_path/'report',
                '--ranks', exp.keep, '--only', 'nothing')
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path/'report'/'variants.csv')
    assert frame[frame.seeds > 0].comparison.tolist() and set(frame.verdict) <= {'cannot tell', 'not run'}
    page = (tmp_path/'report'/'index.html').read_text()
    assert 'The claims of the paper' in page and 'Variants of stage 3' in page
    assert not list((tmp_path/'runs').rglob('run.json'))

# --- other numbers of training clips

def test_numbers_of_training_clips_are_compared_from_runs_of_other_experiments(exp, tmp_path, monkeypatch):
    monkeypatch.setattr(choices_page, 'SIZES', (32,))
    for n in (32, exp.profile.corpus.n_train):
        other = Experiment(exp.profile.replace(n_train=n), exp.runs, keep=exp.keep)
        other.train_all(specs_of(other, points_of(size_ways()[:1]), 1))
    assert [len(runs) for runs in choices_page.sized_runs(exp, 1).values()] == [2]
    report = ClaimsReport('smoke', '', 1, '', tmp_path/'runs', '', tmp_path/'report', 'nothing', exp.keep)
    assert report.show_sizes()['Training clips'].tolist() == ['32', str(exp.profile.corpus.n_train)]
    frame = pd.read_csv(tmp_path/'report'/'sizes.csv')
    assert frame.t2a.notna().all() and frame.joint.gt(0).all() and set(frame.verdict) == {'cannot tell'}
    report.write_record()
    assert list(read_json(tmp_path/'report'/'claims.json')['sized']) == ['32']
    assert not list((tmp_path/'runs').rglob('run.json'))

def test_hard_and_random_batches_are_compared_by_normalisation(exp, tmp_path):
    two = [c for c in choices_page.normalisations() if c.what in ('averages over ten batches', 'GroupNorm') and c.claim == 'full rate']
    exp.train_all(specs_of(exp, points_of(two), 1))
    report = ClaimsReport('smoke', '', 1, '', tmp_path/'runs', '', tmp_path/'report', 'nothing', exp.keep)
    assert {'averages over ten batches', 'GroupNorm'} <= set(report.show_norms().Normalisation)
    frame = pd.read_csv(tmp_path/'report'/'norms.csv')
    assert frame[frame.comparison == 'GroupNorm'].seeds.tolist() == [1, 0]

def test_choices_are_trained_only_if_they_are_named(exp):
    named = lambda only: [s.name for s in claims_needed(Experiment(exp.profile, exp.runs, only=only), 1) if 'remine' in s.name]
    assert not named('') and len(named('*remine=false*')) == 1
