"Models on a user's own sounds: near misses, hard negatives, kinds of queries, two models, the command."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
from sklearn.feature_extraction.text import TfidfVectorizer

from cmlf.appendix import evaluation
from cmlf.appendix.evaluation import Scores, compare, evaluate_model, hard_negative_score, near_misses, query_kinds, recall_by_kind
from cmlf.cli import run_command
from cmlf.config import get_profile
from cmlf.core import CmlfError, rng, seed_everything
from cmlf.data import write_corpus
from cmlf.encoders import DualEncoder, ResNet38, TextEncoder
from cmlf.experiments import evaluate_on, train_on
from cmlf.features import SAMPLE_RATE
from cmlf.metrics import holm, interval, paired_test, retrieval
from cmlf.soundscapes import compose

# --- near misses

def random_captions(T=200, C=60, words=12, seed=0):
    "Captions of few words, so that many are equally similar; owners in any order."
    r = rng(seed, 'captions')
    captions = [' '.join(f'w{i}' for i in r.integers(words, size=r.integers(1, 5))) for _ in range(T - 2)] + ['alone', '–']
    return captions, np.r_[r.permutation(np.r_[np.arange(C - 2), r.integers(C - 2, size=T - C)]), C - 2, C - 1]

@pytest.mark.parametrize('at_once', [2**22, 1000])
def test_near_misses_against_brute_force(at_once, monkeypatch):
    monkeypatch.setattr(evaluation, '_AT_ONCE', at_once)
    captions, owner = random_captions()
    C, r = owner.max() + 1, rng(0, 'groups')
    groups, relevant = r.integers(C - 5, size=C), [set(r.integers(C, size=2).tolist()) for _ in captions]
    found = near_misses(captions, owner, groups, 5, relevant)
    x = TfidfVectorizer(token_pattern=r'\w+').fit_transform(captions).toarray()
    for t, clips in enumerate(found):
        similar = np.array([(x[owner == c] @ x[t]).max() for c in range(C)])
        wrong = [c for c in range(C) if groups[c] != groups[owner[t]] and c not in relevant[t] and similar[c] > 0]
        best = sorted(similar[wrong], reverse=True)[:5]
        kept = clips[clips >= 0]
        assert set(kept) <= set(wrong) and len(set(kept)) == len(kept) == len(best)
        assert np.allclose(similar[kept], best, atol=2e-5)
    assert (found[-2:] == -1).all() and (found >= 0).all(1).mean() > .5

def test_the_order_of_words_makes_a_near_miss_and_equal_meaning_does_not():
    captions = ['a dog barks then a door slams', 'a door slams then a dog barks', 'a dog barks', 'a dog barks then a door slams', 'rain']
    assert near_misses(captions, range(5), [0, 1, 2, 0, 3], 1).T.tolist() == [[1, 3, 3, 1, -1]]

def test_equally_similar_clips_are_spread_over_the_collection():
    found = near_misses(['rain'] * 100, np.arange(100), np.arange(100), 3)
    assert (np.bincount(found.ravel()) == 3).all()

# --- the hard-negative score

def embeddings(T=120, C=40, d=8, noise=1., seed=0):
    r = rng(seed, 'embeddings')
    audio = r.normal(size=(C, d)).astype(np.float32)
    audio[1] = audio[0] # a tie
    owner = np.repeat(np.arange(C), T // C)
    return audio, (audio[owner] + noise * r.normal(size=(T, d))).astype(np.float32), owner

def near_of(owner, C, m=4, seed=0):
    "Random other clips; some captions have fewer or none."
    r = rng(seed, 'near')
    near = np.array([r.permutation(np.setdiff1d(np.arange(C), [c]))[:m] for c in owner])
    near[::7, 2:], near[::11], near[0, 0] = -1, -1, -1
    near[1, :2] = 1, 2 # of clip 0, which is equal to clip 1
    return near

def test_hard_negatives_against_brute_force():
    audio, text, owner = embeddings()
    near = near_of(owner, len(audio))
    unit = lambda x: x / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    s, won, best = (unit(text) @ unit(audio).T).astype(np.float32), [], []
    for t, clips in enumerate(near):
        wins = [float(s[t, owner[t]] > s[t, c]) if {owner[t], c} != {0, 1} else .5 for c in clips if c >= 0]
        won += wins
        if wins: best.append(all(w == 1 for w in wins))
    hard = hard_negative_score(audio, text, owner, near)
    assert .5 in won and hard.misses.sum() == len(won) and (hard.misses > 0).sum() == len(best) < len(near)
    assert hard.score() == pytest.approx(100 * np.mean(won)) and hard.score('captions') == pytest.approx(100 * np.mean(best))
    for of in ('pairs', 'captions'): assert hard.interval(of)[0] < hard.score(of) < hard.interval(of)[1]
    with pytest.raises(CmlfError, match='pear'): hard.score('pear')
    with pytest.raises(CmlfError, match='text embeddings'): hard_negative_score(audio, text * np.nan, owner, near)

def test_with_all_other_clips_as_near_misses_it_is_recall_at_1():
    audio, text, owner = embeddings(noise=2)
    audio[1] = -audio[0]
    near = np.array([np.setdiff1d(np.arange(len(audio)), [c]) for c in owner])
    found, hard = retrieval(audio, text, owner), hard_negative_score(audio, text, owner, near)
    assert hard.score('captions') == pytest.approx(found.t2a['R@1']) and hard.interval('captions') == list(interval(found, 1, 't2a'))
    assert hard.score() == pytest.approx(100 - 100 * found.t2a_ranks.mean() / (len(audio) - 1))

def test_a_model_that_hears_nothing_has_a_half_and_is_never_above_all():
    owner = np.repeat(np.arange(10), 2)
    hard = hard_negative_score(np.ones((10, 3)), np.ones((20, 3)), owner, (owner[:, None] + 1) % 10)
    assert hard.score() == 50 and hard.score('captions') == 0

# --- kinds of queries

def test_kinds_are_counted_by_words():
    captions = ["Dogs can't bark", 'no rain', 'NOBODY, nothing', 'a piano and a knot', 'without wind or rain', "It isn’t loud", 'Rain.', 'rain', 'a b c', 'd e f']
    kinds = query_kinds(captions, np.r_[np.arange(9), 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [set()] * 8 + [{8}, {8, 2}])
    assert np.flatnonzero(kinds['short']).tolist() == [1, 2, 6, 7]
    assert np.flatnonzero(kinds['negated']).tolist() == [0, 1, 2, 4, 5]
    assert np.flatnonzero(kinds['several']).tolist() == [6, 7, 9] and np.flatnonzero(kinds['other']).tolist() == [3, 8]
    grouped = query_kinds(captions, np.r_[np.arange(9), 8], [0, 1, 2, 0, 4, 5, 6, 7, 8])
    assert np.flatnonzero(grouped['several']).tolist() == [0, 3, 6, 7]

def test_recall_by_kind():
    audio, text, owner = embeddings()
    found, some = retrieval(audio, text, owner), rng(0, 'kind').random(len(owner)) < .3
    by_kind = recall_by_kind(found, dict(some=some, all=some | True, none=some & False))
    assert by_kind['some']['captions'] == some.sum() and by_kind['some']['share'] == pytest.approx(100 * some.mean())
    for k in (1, 5, 10):
        assert by_kind['some']['t2a'][f'R@{k}'] == pytest.approx(100 * (found.t2a_ranks[some] < k).mean())
        assert by_kind['all']['t2a'][f'R@{k}'] == found.recall(k, 't2a') and by_kind['all']['intervals'][f'R@{k}'] == list(interval(found, k, 't2a'))
    assert by_kind['none'] == dict(captions=0, share=0, t2a=dict.fromkeys(('R@1', 'R@5', 'R@10')), intervals=dict.fromkeys(('R@1', 'R@5', 'R@10')))

# --- two models

def test_equal_models_and_a_shuffled_one():
    audio, text, owner = embeddings(noise=.5)
    near = near_of(owner, len(audio))
    good, bad = Scores.of(audio, text, owner, near), Scores.of(rng(0, 'shuffle').permutation(audio), text, owner, near)
    same, better, worse = compare(good, good), compare(good, bad), compare(bad, good)
    assert len(same) == 9 and (same.difference == 0).all() and (same.p == 1).all() and set(same.verdict) == {'cannot tell'}
    assert set(better.verdict) == {'higher'} and set(worse.verdict) == {'lower'}
    assert np.allclose(better.difference, better.a - better.b) and np.allclose(better.difference, -worse.difference)
    assert np.array_equal(better.p_holm, holm(better.p)) and better.p[7] == paired_test(good.found, bad.found, 10, 'a2t', of='map').p
    assert better.a[8] == good.hard.score() and better.score[8] == 'near misses'
    lonely = [Scores.of(audio, text, owner, np.full_like(near, -1))] * 2
    assert len(compare(*lonely)) == 8

# --- models by name, and the command

@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('CMLF_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield m

@pytest.fixture(scope='module')
def data(tmp_path_factory, cache):
    corpus = compose(get_profile('smoke').replace(n_train=16, n_val=8, n_test=12))
    return write_corpus(corpus, tmp_path_factory.mktemp('own'))

@pytest.fixture(scope='module')
def run(data, tmp_path_factory): return train_on(data, get_profile('smoke'), tmp_path_factory.mktemp('runs')/'run', 'baseline')

def saved_model(folder, seed=0, seconds=2):
    seed_everything(seed)
    model = DualEncoder(ResNet38(width=1), TextEncoder('tiny'), 8, 16)
    model.seconds = seconds
    model.save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def model(tmp_path_factory): return saved_model(tmp_path_factory.mktemp('model')/'m')

def command(capsys, *arguments):
    capsys.readouterr()
    code = run_command([str(a) for a in ('evaluate', *arguments)])
    return code, *capsys.readouterr()

def test_the_command_on_a_run(run, data, capsys):
    code, out, _ = command(capsys, run.folder, '--data', data, '--at', 3, '--json')
    facts = json.loads(out)
    known = evaluate_on(run, data, depths=[3])
    assert code == 0 and {k: facts[k] for k in known} == known and facts['model'] == str(run.folder) and 'comparison' not in facts
    assert facts['near_misses']['asked'] == 5 and facts['near_misses']['pairs'] <= 5 * 60 and 0 <= facts['near_misses']['score'] <= 100
    assert facts['kinds']['other']['captions'] + facts['kinds']['several']['captions'] == 60 and facts['kinds']['other']['t2a']['R@5'] >= 0
    low, high = facts['intervals']['t2a']['R@5']
    assert low <= facts['t2a']['R@5'] <= high
    assert len([*(run.folder/'work'/'features').glob('*.npy')]) == 3 # train and val of the training, test of both evaluations

def test_the_command_on_a_saved_model_against_a_run(model, run, data, cache, capsys):
    code, out, _ = command(capsys, model, '--data', data, '--against', run.folder, '--near-misses', 2, '--json')
    facts = json.loads(out)
    assert code == 0 and facts['run'] is None and facts['against']['run'] == run.metadata['key'] and not facts['same_weights']
    assert facts['against']['t2a'] == evaluate_on(run, data)['t2a'] and len(facts['comparison']) == 9
    first = facts['comparison'][0]
    assert first['a'] == facts['t2a']['R@1'] and first['b'] == facts['against']['t2a']['R@1'] and first['verdict'] in ('higher', 'lower', 'cannot tell')
    assert [*(evaluation.cache_folder()/'features').glob('*.npy')] and not (model/'work').exists()
    code, out, _ = command(capsys, model, '--data', data, '--against', run.folder)
    assert code == 0 and all(f'| {words} ' in out for words in ('text to audio', 'above a near miss', '1 or 2 words', 'R@1, text to audio'))
    assert '12 of 12 clips' in out and facts['fingerprint'] in out and facts['against']['fingerprint'] in out

def test_a_good_model_is_told_apart_from_a_shuffled_one_by_the_command(model, data, tmp_path, monkeypatch, capsys):
    r = rng(0, 'audio').normal(size=(12, 8))
    texts, shuffled = np.repeat(r, 5, axis=0), np.roll(r, 3, axis=0)
    audio = iter([r, shuffled])
    monkeypatch.setattr(evaluation, 'embed_split', lambda *_: (next(audio), texts + .1 * rng(1, 'text').normal(size=texts.shape)))
    code, out, _ = command(capsys, model, '--data', data, '--against', saved_model(tmp_path/'other', 1), '--json')
    verdicts = {(r['score'], r['direction']): r['verdict'] for r in json.loads(out)['comparison']}
    assert code == 0 and verdicts['R@1', 't2a'] == verdicts['mAP@10', 'a2t'] == 'higher' and verdicts['R@10', 't2a'] == 'cannot tell'

def test_a_model_against_itself_is_said(model, data, capsys):
    found = evaluate_model(model, data, against=model)
    assert found['same_weights'] and {r['verdict'] for r in found['comparison']} == {'cannot tell'} and {r['difference'] for r in found['comparison']} == {0}
    assert 'same weights' in found.tables()

def test_each_model_has_its_own_length_and_both_the_same_clips(model, tmp_path, monkeypatch):
    "A file that is cut off after 2.5 seconds can be used by the model with clips of one second, but not by the other."
    monkeypatch.setenv('CMLF_CACHE', str(tmp_path/'cache'))
    names, short = [f'{i}.wav' for i in range(6)], saved_model(tmp_path/'short', 1, seconds=1)
    for i, name in enumerate(names): sf.write(tmp_path/name, rng(i, 'wave').uniform(-.5, .5, SAMPLE_RATE * 4), SAMPLE_RATE)
    whole = (tmp_path/names[2]).read_bytes()
    (tmp_path/names[2]).write_bytes(whole[:len(whole) * 5 // 8])
    data = tmp_path/'data.csv'
    pd.DataFrame(dict(path=names, caption=[f'sound number {i}' for i in range(6)], split='test')).to_csv(data, index=False)
    pd.DataFrame(dict(caption=['sound number 3'] * 2, file_name=['2.wav', '4.wav'])).to_csv(tmp_path/'right.csv', index=False)
    alone, both = evaluate_model(short, data), evaluate_model(short, data, against=model, relevance=tmp_path/'right.csv')
    assert alone['coverage']['coverage'] == '6 of 6 clips' and both['coverage']['coverage'] == '5 of 6 clips'
    assert both['pool'] == both['against']['pool'] == dict(clips=5, captions=5) and both['kinds']['several']['captions'] == 1
    frames = {np.load(f, mmap_mode='r').shape for f in (tmp_path/'cache'/'features').glob('*.npy')}
    assert frames == {(6, 101, 64), (5, 101, 64), (5, 201, 64)}

def test_all_clips_of_a_table_without_splits(model, data, tmp_path, capsys):
    table = pd.read_csv(data).drop(columns='split').assign(path=lambda f: [str(data.parent/p) for p in f.path])
    table.to_csv(tmp_path/'own.csv', index=False)
    pools = {split: json.loads(command(capsys, model, '--data', tmp_path/'own.csv', '--split', split, '--json')[1])['pool']['clips'] for split in ('train', 'all')}
    assert pools['all'] == table.path.nunique() == 36 > pools['train']

@pytest.mark.parametrize('arguments, words', [
    (['{tmp}'], ['no model here', 'cmlf train']), (['no model'], ['no such folder']), (['{data}'], ['a file']),
    (['{model}', '--against', '{tmp}/none'], ['none']), (['{model}', '--at', 0], ['k=0']), (['{model}', '--near-misses', 0], ['0 near misses']),
    (['{model}', '--split', 'dev'], ['dev', 'train, val, test']), (['{model}', '--data', '{tmp}/none.csv'], ['none.csv']),
    (['{model}', '--relevance', '{tmp}/none.csv'], ['none.csv']), (['{ce}'], ["a run of 'ce'"]),
    (['{model}', '--data', '{one}'], ['no test clips', 'but train', '--split train'])])
def test_bad_input_is_one_line(arguments, words, model, data, tmp_path, capsys):
    (tmp_path/'ce').mkdir()
    (tmp_path/'ce'/'run.json').write_text('{"spec": {"system": "ce"}, "key": "x"}')
    table = pd.read_csv(data)
    one = Path(data).with_name('one.csv')
    table[table.split == 'train'].to_csv(one, index=False)
    named = dict(tmp=tmp_path, model=model, data=data, one=one, ce=tmp_path/'ce')
    arguments = [str(a).format(**named) for a in arguments]
    code, out, error = command(capsys, *arguments, *(['--data', data] * ('--data' not in arguments)))
    lines = [line for line in error.splitlines() if line.startswith('cmlf: ')] # lines about the corpus may come before it
    assert code == 2 and not out and len(lines) == 1 and 'Traceback' not in error and all(w in lines[0] for w in words), error
