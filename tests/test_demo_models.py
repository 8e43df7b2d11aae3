"Scores of a model on folders of sounds, and what is stored about the packaged models."
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from cmlf.appendix import demo_models
from cmlf.appendix.demo_models import class_table, read_measured, score_folder, search_table, write_measured
from cmlf.appendix.hub import PACKAGED
from cmlf.core import CmlfError, rng, seed_everything
from cmlf.encoders import DualEncoder, ResNet38, TextEncoder
from cmlf.features import SAMPLE_RATE

def some_scores(n=60, classes=4, seed=0):
    r, names = rng(seed, 'scores'), [f'Sentence {i}.' for i in range(classes)]
    right = np.array(names)[r.integers(classes, size=n)]
    return pd.concat([pd.DataFrame(dict(file=[f'{i}.wav' for i in range(n)], right=right)),
                      pd.DataFrame(r.normal(size=(n, classes)), columns=names)], axis=1)

def test_tables_against_counts_by_hand():
    scores = some_scores()
    names, table, hits = list(scores.columns[2:]), class_table(scores).set_index('sentence'), search_table(scores, 7).set_index('sentence')
    assert table.sounds.sum() == 2 * 60 and (table.chance == 25).all() and table.index[-1] == 'all'
    for s in names:
        rows = [r for _, r in scores.iterrows() if r.right == s]
        assert table.right[s] == pytest.approx(100 * np.mean([max(names, key=lambda n: r[n]) == s for r in rows]))
        assert table.low[s] < table.right[s] < table.high[s]
        first = scores.sort_values(s, ascending=False).right[:7] == s
        assert hits.right[s] == pytest.approx(100 * first.mean()) and hits['first'][s] == first.iloc[0]
        assert hits.chance[s] == pytest.approx(100 * len(rows) / 60)
    assert table.right['all'] == pytest.approx((table.right * table.sounds)[:-1].sum() / 60)

def test_intervals_are_those_of_wilson():
    "8 of 8 and 0 of 8: 67.6 to 100, and 0 to 32.4."
    x = pd.DataFrame(dict(file=list('abcdefgh') * 2, right=['a'] * 8 + ['b'] * 8, a=1., b=0.))
    table = class_table(x)
    assert [table.low[0], table.high[0], table.low[1], table.high[1]] == pytest.approx([67.56, 100, 0, 32.44], abs=.01)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('classes')
    for i, name in enumerate(('low/a.wav', 'low/deep/b.flac', 'high/c.wav')):
        (out/name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(out/name, rng(i, 'wave').uniform(-.5, .5, SAMPLE_RATE), SAMPLE_RATE)
    (out/'low'/'notes.txt').write_text('no sound')
    (out/'empty').mkdir()
    return out

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    seed_everything(0)
    model = DualEncoder(ResNet38(width=1), TextEncoder('tiny'), 8, 16)
    model.seconds = 1
    model.save_pretrained(out := tmp_path_factory.mktemp('model')/'m')
    return out

def test_a_folder_is_scored(model, folder):
    scores = score_folder(model, folder, dict(high='a high sound', low='a low sound'))
    assert list(scores.columns) == ['file', 'right', 'a high sound', 'a low sound']
    assert dict(zip(scores.file, scores.right)) == {'high/c.wav': 'a high sound', 'low/a.wav': 'a low sound', 'low/deep/b.flac': 'a low sound'}
    m = DualEncoder.from_pretrained(model)
    cosine = m.encode_text(['a low sound'])[0] @ m.encode_audio([folder/'high'/'c.wav'])[0]
    assert scores['a low sound'][0] == pytest.approx(cosine, abs=1e-5)

@pytest.mark.parametrize('sentences, match', [
    (dict(low='a', none='b'), "no folder 'none'"), (dict(low='a', empty='b'), 'empty: no file has the name of a sound'),
    (dict(low='a', high='a'), '1 different sentences for 2'), (dict(low='a'), '1 different sentences for 1'), ({}, '0 different')])
def test_bad_input_is_one_line(model, folder, sentences, match):
    with pytest.raises(CmlfError, match=match) as e: score_folder(model, folder, sentences)
    assert '\n' not in str(e.value)

def test_a_broken_sound_is_named(model, folder, tmp_path):
    for name in ('a', 'b'): (tmp_path/name).mkdir()
    sf.write(tmp_path/'a'/'good.wav', np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    (tmp_path/'b'/'bad.wav').write_text('no sound')
    with pytest.raises(CmlfError, match='bad.wav'): score_folder(model, tmp_path, dict(a='x', b='y'))

def test_cosines_of_other_weights_are_refused(monkeypatch, tmp_path, model):
    monkeypatch.setattr(demo_models, 'PACKAGED', model.parent)
    with pytest.raises(CmlfError, match='no such file; measure again'): read_measured('m')
    scores = some_scores()
    path = write_measured(scores, 'm', 'by a test, today')
    again, about = read_measured('m')
    assert about == 'by a test, today' and np.allclose(again.iloc[:, 2:], scores.iloc[:, 2:], atol=1e-4) and again.right.equals(scores.right.astype(again.right.dtype))
    path.write_text(path.read_text().replace('# weights ', '# weights 0'))
    with pytest.raises(CmlfError, match='other weights'): read_measured('m')

def esc_folder():
    folder = os.environ.get('CMLF_ESC_DIR', '')
    if not list(Path(folder).glob('001 - *')) or not folder: pytest.skip('CMLF_ESC_DIR is not a folder of ESC-10')
    return Path(folder)

@pytest.mark.parametrize('name', ['demo', 'recordings'])
def test_what_is_stored_belongs_to_the_weights(name):
    "The card says what the file says, and the file has all recordings."
    scores, about = read_measured(name)
    assert len(scores) == 400 and (scores.right.value_counts() == 40).all() and 'measure' in about
    if name == 'recordings': scores = scores[scores.file.str.contains('/5-')]
    row, card = class_table(scores).iloc[-1], (PACKAGED/name/'README.md').read_text()
    assert f'On {row.sounds} single recordings' in card and f'for {row.right:.0f} % (95 % interval {row.low:.0f} to {row.high:.0f}' in card

@pytest.mark.parametrize('name', ['demo', 'recordings'])
def test_what_is_stored_can_be_measured_again(name):
    folder, (scores, _) = esc_folder(), read_measured(name)
    some = scores.groupby('right', sort=False).nth(7)
    m = DualEncoder.from_pretrained(name)
    cosines = m.encode_audio([folder/f for f in some.file]) @ m.encode_text(list(scores.columns[2:])).T
    assert np.abs(cosines - some.iloc[:, 2:].to_numpy()).max() < 5e-3
