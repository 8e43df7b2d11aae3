"Soundscapes: recordings in both layouts, bad input, determinism, and splits without common sources."
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from cmlf.config import get_profile
from cmlf.core import CmlfError, content_hash, rng
from cmlf.data import SPLITS
from cmlf.features import SAMPLE_RATE
from cmlf.soundscapes import (EVENTS, Event, Scene, caption_scene, compose, draw_scenes, recording_library,
                              synth_library, tagging_corpus)

REAL = os.environ.get('CMLF_ESC_DIR')  # the variable is removed for most tests
SMOKE = get_profile('smoke')
RECORDINGS = get_profile('smoke', {'corpus': 'recordings', 'n_train': 40, 'n_val': 8, 'n_test': 8})


def tone(path, hertz, seconds=1.0, silence=.5):
    "A tone followed by zeros, as ESC-50 pads short recordings."
    t = np.arange(int(seconds*SAMPLE_RATE))/SAMPLE_RATE
    wave = np.concatenate([.5*np.sin(2*np.pi*hertz*t), np.zeros(int(silence*SAMPLE_RATE))])
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, wave, SAMPLE_RATE)


def esc50(folder, kinds=('dog', 'rain', 'clock_tick', 'siren'), folds=(1, 2, 3, 4, 5)):
    rows = ['filename,fold,target,category,esc10,src_file,take']
    for i, kind in enumerate(kinds):
        for fold in folds:
            name = f'{fold}-{1000*i + fold}-A-{i}.wav'
            tone(folder/'audio'/name, 200*(i + 1) + 10*fold)
            rows.append(f'{name},{fold},{i},{kind},False,{1000*i + fold},A')
    (folder/'meta').mkdir(exist_ok=True)
    (folder/'meta'/'esc50.csv').write_text('\n'.join(rows) + '\n')
    (folder/'LICENSE').write_text('101 - Dog:\n- [1-1-A.ogg]: clip derived from a (b).wav (http://x/y/) by someone [CC-BY]\n')
    return folder


def esc10(folder):
    for i, name in enumerate(('001 - Dog bark', '002 - Rain', '004 - Baby cry')):
        for fold in range(1, 6): tone(folder/name/f'{fold}-{fold}-A.wav', 200*(i + 1) + 10*fold)
    return folder


@pytest.fixture(autouse=True)
def no_folder_in_the_environment(monkeypatch): monkeypatch.delenv('CMLF_ESC_DIR', raising=False)


def check(corpus, profile):
    assert [len(corpus.split(s)) for s in SPLITS] == [profile.corpus.n_train, profile.corpus.n_val, profile.corpus.n_test]
    for s in ('val', 'test'):
        clips = corpus.split(s).clips
        assert len({c.meaning for c in clips}) == len(clips)
        assert all(len(set(c.captions)) == 5 for c in clips)
    train = corpus.split('train').clips
    assert all(len(c.captions) == 1 for c in train)
    assert len(train) - len({c.meaning for c in train}) < .03*len(train)
    used = {s: {e.source for c in corpus.split(s).clips for e in corpus.scenes[c.id].events} for s in SPLITS}
    assert not used['train'] & used['val'] and not used['train'] & used['test'] and not used['val'] & used['test']
    wave = corpus.waveform(0)
    assert wave.dtype == np.float32 and wave.shape == (round(profile.audio.seconds*SAMPLE_RATE),) and np.isfinite(wave).all()
    assert 0 < np.abs(wave).max() <= 1


@pytest.mark.parametrize('name', ['smoke', 'mini'])
def test_synthesised_corpus(name):
    profile = get_profile(name)
    check(compose(profile), profile)


def test_esc50_layout(tmp_path):
    folder = esc50(tmp_path)
    corpus = compose(RECORDINGS, folder)
    check(corpus, RECORDINGS)
    library = recording_library(folder.resolve())
    assert library.sources['test'] == {k: (f'audio/5-{1000*i + 5}-A-{i}.wav',)
                                       for k, i in dict(clock_tick=2, dog=0, rain=1, siren=3).items()}
    assert library.credits['audio/1-1-A-0.wav'] == '1-1-A-0.wav: clip derived from a (b).wav (http://x/y/) by someone CC-BY'
    assert 'no credit found' in library.credits['audio/2-2-A-0.wav']


def test_esc10_layout_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('CMLF_ESC_DIR', str(esc10(tmp_path)))
    corpus = compose(RECORDINGS.replace(n_train=20))
    assert corpus.tags == ['crying_baby', 'dog', 'rain'] and corpus.name == 'soundscapes from recordings'


def test_tagging_uses_training_sources_and_other_scenes(tmp_path):
    tagging, corpus = tagging_corpus(SMOKE), compose(SMOKE)
    assert all('/train/' in e.source for s in tagging.scenes.values() for e in s.events)
    assert not {c.source for c in tagging.clips} & {c.source for c in corpus.clips}
    matrix = tagging.split('train').tag_matrix
    assert matrix.shape == (SMOKE.tagger.pretrain_scenes, len(tagging.tags)) and matrix.sum(1).min() >= 1
    assert len(tagging.split('val')) >= 16


def test_silence_is_trimmed_and_levels_are_relative(tmp_path):
    library = recording_library(esc50(tmp_path).resolve())
    rms = {a: np.sqrt(np.square(library.render('rain', library.sources['test']['rain'][0], 2., a)).mean())
           for a in ('loud', '', 'faint')}
    assert 1.6 < rms['loud']/rms[''] < 4.2 and 2.3 < rms['']/rms['faint'] < 6
    x = library.render('rain', library.sources['test']['rain'][0], 3.)  # 1 s of tone is looped without a gap
    assert np.square(x).reshape(-1, 3200).mean(1).min() > .2*np.square(x).mean()


def test_all_fifty_classes_have_phrases():
    names = '''dog rooster pig cow frog cat hen insects sheep crow rain sea_waves crackling_fire crickets chirping_birds
        water_drops wind pouring_water toilet_flush thunderstorm crying_baby sneezing clapping breathing coughing footsteps
        laughing brushing_teeth snoring drinking_sipping door_wood_knock mouse_click keyboard_typing door_wood_creaks
        can_opening washing_machine vacuum_cleaner clock_alarm clock_tick glass_breaking helicopter chainsaw siren car_horn
        engine train church_bells airplane fireworks hand_saw'''.split()
    assert len(names) == 50 and set(names) <= set(EVENTS)


def broken(tmp_path, change):
    folder = esc50(tmp_path)
    change(folder)
    with pytest.raises(CmlfError) as e: compose(RECORDINGS, folder).waveform(0)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_bad_folders(tmp_path):
    with pytest.raises(CmlfError, match='set CMLF_ESC_DIR'): compose(RECORDINGS)
    with pytest.raises(CmlfError, match='nowhere: no such folder'): compose(RECORDINGS, tmp_path/'nowhere')
    with pytest.raises(CmlfError, match='no recordings in it'): compose(RECORDINGS, tmp_path)
    (tmp_path/'001 - Dog bark').mkdir()
    with pytest.raises(CmlfError, match='001 - Dog bark: holds no audio'): compose(RECORDINGS, tmp_path)


def test_missing_row_fold_and_class(tmp_path):
    edit = lambda a, b: lambda f: (f/'meta'/'esc50.csv').write_text((f/'meta'/'esc50.csv').read_text().replace(a, b))
    assert 'line 2' in broken(tmp_path/'a', edit('1-1-A-0.wav,', 'gone.wav,'))
    assert "fold '9'" in broken(tmp_path/'b', edit('1-1-A-0.wav,1', '1-1-A-0.wav,9'))
    assert "did you mean 'siren'" in broken(tmp_path/'c', edit('siren', 'sirens'))
    assert 'needs the columns' in broken(tmp_path/'d', edit('category', 'label'))


def test_unreadable_and_silent_recordings_are_named(tmp_path):
    def spoil(folder):
        for path in (folder/'audio').iterdir(): path.write_bytes(b'not sound')
    assert 'audio/' in broken(tmp_path/'a', spoil)
    def silence(folder):
        for path in (folder/'audio').iterdir(): sf.write(path, np.zeros(40000), SAMPLE_RATE)
    assert 'silent' in broken(tmp_path/'b', silence)


def test_too_few_sources_classes_or_meanings(tmp_path):
    with pytest.raises(CmlfError, match="class 'dog' has too few sources: none for val; add one of fold 4"):
        compose(RECORDINGS, esc50(tmp_path/'a', kinds=('dog', 'rain', 'siren'), folds=(1, 2, 3, 5)))
    with pytest.raises(CmlfError, match='2 classes are too few'): compose(RECORDINGS, esc50(tmp_path/'b', kinds=('dog', 'rain')))
    with pytest.raises(CmlfError, match='too few meanings'):
        compose(RECORDINGS.replace(n_test=9000), esc50(tmp_path/'c', kinds=('dog', 'rain', 'wind')))


def test_one_continuous_class_is_enough_for_backgrounds(tmp_path):
    library = recording_library(esc50(tmp_path, kinds=('dog', 'rain', 'clock_tick')).resolve())
    scenes = draw_scenes(library, 'train', 300, 0)
    backgrounds = [s for s in scenes if s.relation == 'background']
    assert backgrounds and {s.events[1].kind for s in backgrounds} == {'rain'}
    assert all(len({e.kind for e in s.events}) == len(s.events) for s in scenes)


@pytest.mark.parametrize('key', ['n_train', 'n_val', 'n_test'])
def test_no_scenes(key):
    with pytest.raises(CmlfError, match=key): compose(SMOKE.replace(**{key: 0}))


def test_other_corpora_are_refused():
    with pytest.raises(CmlfError, match="unknown corpus to compose 'audiocaps'"): compose(get_profile('audiocaps'))
    with pytest.raises(CmlfError, match='pretrain_scenes=0'): tagging_corpus(SMOKE.replace(pretrain_scenes=0))


FINGERPRINT = '''
import numpy as np
from cmlf.config import get_profile
from cmlf.core import content_hash
from cmlf.soundscapes import compose
c = compose(get_profile('smoke'))
x = c.waveform(3)
print(c.hash, content_hash(np.round(x, 3).tolist()))
'''


def test_the_same_in_another_process():
    runs = {subprocess.run([sys.executable, '-c', FINGERPRINT], capture_output=True, text=True, check=True,
                           env=os.environ | {'PYTHONHASHSEED': str(i)}).stdout for i in (1, 2)}
    corpus = compose(SMOKE)
    assert runs == {f'{corpus.hash} {content_hash(np.round(corpus.waveform(3), 3).tolist())}\n'}


def test_seed_and_prefix():
    library = synth_library()
    assert draw_scenes(library, 'train', 300, 0)[:50] == draw_scenes(library, 'train', 50, 0)
    assert draw_scenes(library, 'train', 50, 0) != draw_scenes(library, 'train', 50, 1)


def test_random_numbers_of_takes_are_disjoint():
    library = synth_library()
    first = {s: {tuple(rng(0, 'take', t).uniform(0, 1, 2)) for ts in library.sources[s].values() for t in ts} for s in SPLITS}
    assert len(set().union(*first.values())) == sum(map(len, first.values()))


@pytest.mark.parametrize('kind', synth_library().kinds)
def test_events_of_every_length_are_audible(kind):
    library = synth_library()
    for seconds in (.4, 2.):
        for a in ('', *library.attributes(kind)):
            x = library.render(kind, library.sources['val'][kind][0], seconds, a)
            assert len(x) == round(seconds*SAMPLE_RATE) and np.isfinite(x).all() and np.abs(x).max() > 1e-3


def test_captions_name_no_other_attribute():
    a, b = Scene('while', (Event('dog', 'loud'), Event('rain')), 's'), Scene('while', (Event('dog'), Event('rain')), 's')
    loud = ('loud', 'noisy', 'noisily')
    assert all(any(w in c.lower() for w in loud) for c in caption_scene(a, 5))
    assert not any(any(w in c.lower() for w in loud) for c in caption_scene(b, 5))


@pytest.mark.skipif(not REAL, reason='CMLF_ESC_DIR is not set: no recordings to compose from')
def test_real_recordings():
    folder = Path(REAL)
    profile = get_profile('field', {'seconds': 2.0})
    corpus = compose(profile, folder)
    check(corpus, profile)
    assert all('clip derived from' in part for c in corpus.clips for part in c.credit.split(' | '))
    sources = recording_library(folder.resolve()).sources  # takes of one field recording share a split
    origin = {s: {Path(p).name.split('-')[1] for ps in sources[s].values() for p in ps} for s in SPLITS}
    assert not origin['train'] & origin['test'] and not origin['train'] & origin['val'] and not origin['val'] & origin['test']
