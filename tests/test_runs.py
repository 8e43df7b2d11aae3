"Training and evaluation on own sounds through the command: errors before any work, stored runs, relative paths."
import json, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from cmlf.appendix.checkpoints import panns_front_end
from cmlf.appendix.resume import only_one
from cmlf.core import CmlfError
from cmlf.encoders import ResNet38
from cmlf.experiments import evaluate_on
from cmlf.report import report_folder
from cmlf.runs import Run
from command import cmlf

SMALL = ['--set', 'width=4', '--set', 'text_model=tiny', '--set', 'text_frozen=0', '--set', 'epochs=3', '--set', 'seconds=1', '--set', 'batch_size=8',
         '--set', 'head_hidden=16', '--set', 'joint_dim=16']

def tones(folder, rows):
    "A manifest beside its sounds: (name, caption, split) each."
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, *_) in enumerate(rows):
        wave = 0.3 * np.sin(2 * np.pi * 200 * 1.3 ** (i % 9) * np.arange(16000) / 16000) + 0.01 * np.random.default_rng(i).normal(size=16000)
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder/name, wave, 16000)
    pd.DataFrame(rows, columns=['path', 'caption', 'split']).to_csv(folder/'manifest.csv', index=False)
    return folder/'manifest.csv'

def some_rows(train=24, val=8, test=8):
    splits = ['train'] * train + ['val'] * val + ['test'] * test
    return [(f'{i:02}.wav', f'A tone, number {i}', s) for i, s in enumerate(splits)]

def nothing_computed(folder): return not [f for f in Path(folder).rglob('*') if f.suffix in ('.npy', '.part', '.safetensors')]

# --- errors before any feature is computed

@pytest.mark.parametrize('system', ['3cmlf', 'baseline'])
def test_no_validation_split_is_refused_before_features(system, tmp_path):
    data = tones(tmp_path/'own', some_rows(val=0))
    assert_refused_after_facts(cmlf('train', '--data', data, *SMALL, '--system', system, '--out', tmp_path/'run'), 'no val clips', 'split=val', '80/10/10')
    assert nothing_computed(tmp_path/'run')

def assert_refused_after_facts(done, *words):
    "Check for exit code 2 and one line of `cmlf` with all `words`; log lines about the corpus may come before it."
    assert done.returncode == 2, done.stderr
    lines = [l for l in done.stderr.strip().splitlines() if l.startswith('cmlf: ')]
    assert len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    for word in words: assert word in lines[0], lines[0]

def test_a_corpus_of_one_split_is_described(tmp_path):
    data = tones(tmp_path/'own', some_rows(val=0, test=0))
    done = cmlf('data', '--data', data, '--json')
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts['train'] == dict(clips=24, captions=24) and 'val' not in facts and 'test' not in facts

def test_a_caption_that_is_too_long_is_named_by_file_and_row_before_features(tmp_path):
    rows = some_rows()
    rows[30] = ('30.wav', 'rain ' * 700, 'val')
    data = tones(tmp_path/'own', rows)
    assert_refused_after_facts(cmlf('train', '--data', data, *SMALL, '--out', tmp_path/'run'), 'manifest.csv row 32', '512')
    assert nothing_computed(tmp_path/'run')

# --- training

def test_an_infinite_loss_gives_one_line_with_place_and_fix(tmp_path):
    data = tones(tmp_path/'own', some_rows())
    done = cmlf('train', '--data', data, *SMALL, '--set', 'lr=1e30', '--set', 'schedule=constant', '--set', 'clip_norm=0', '--out', tmp_path/'run',
                '--system', 'baseline')
    assert_refused_after_facts(done, 'stage 1', 'epoch 1', 'lower lr=1e+30')

def test_two_commands_in_one_folder(tmp_path):
    data = tones(tmp_path/'own', some_rows())
    with only_one(tmp_path/'run'/'work'):
        done = cmlf('train', '--data', data, *SMALL, '--out', tmp_path/'run')
    assert_refused_after_facts(done, 'another command writes to this folder')

def test_joint_training_is_the_default_and_settings_that_it_does_not_read_are_named(tmp_path):
    data = tones(tmp_path/'own', some_rows())
    train = lambda *more: cmlf('train', '--data', data, *SMALL, '--out', tmp_path/'run', *more)
    assert_refused_after_facts(train('--chm'), 'random batches', '3cmlf')
    assert nothing_computed(tmp_path/'run')
    done = train('--set', 'batch_size=4', '--set', 'ancillary=audio', '--set', 'kinds=hard+random+easy')
    assert done.returncode == 0, done.stderr
    line, = (l for l in done.stderr.splitlines() if 'not read by' in l)
    assert 'kinds, ancillary: not read by baseline-scratch' in line and 'batch_size' not in line
    assert Run(tmp_path/'run').metadata['spec']['system'] == 'baseline'

def test_class_names_as_captions_train(tmp_path):
    "4 captions on 64 clips: groups too large for the batches are spread, and one line per run reports it."
    rows = [(f'{i:02}.wav', ['dog', 'rain', 'bell', 'wind'][i % 4], 'train' if i < 48 else 'val' if i < 56 else 'test') for i in range(64)]
    done = cmlf('train', '--data', tones(tmp_path/'own', rows), *SMALL, '--system', '3cmlf', '--out', tmp_path/'run', '--json')
    assert done.returncode == 0, done.stderr
    logged = [l for l in done.stderr.splitlines() if 'spread as evenly as possible' in l]
    assert len(logged) == 2 and '4 groups' in logged[0]   # the baseline's run and the mined one

# --- a finished run needs nothing but its folder

@pytest.fixture(scope='module')
def from_panns(tmp_path_factory):
    "A run that started from a PANNs file given by a relative path, its folder moved since, the file gone."
    folder = tmp_path_factory.mktemp('panns')
    data = tones(folder/'own', some_rows())
    weights = {k: v for k, v in ResNet38(4).state_dict().items()} | panns_front_end()
    torch.save(dict(model=weights), folder/'weights.pth')
    done = cmlf('train', '--data', 'own/manifest.csv', '--profile', 'audiocaps', *SMALL, '--set', 'panns=weights.pth', '--set', 'budget=equal_epochs',
                '--out', 'run', cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder/'weights.pth').unlink()
    (folder/'moved').mkdir()
    shutil.move(folder/'run', folder/'moved'/'run')
    return folder/'moved'/'run', data

def test_a_moved_run_is_evaluated_without_its_panns_file(from_panns):
    run, data = from_panns
    found = cmlf('evaluate', run, '--data', data, '--json')
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert {'R@50'} <= set(facts['more']['t2a']) and {'mAP@10'} <= set(facts['map']['a2t'])
    assert Run(run).metadata['profile']['tagger']['panns'].startswith('/') and Run(run).metadata['precision'] in ('bf16', 'float32')

def test_the_given_corpus_is_scored(from_panns, tmp_path):
    "Regression: a run of composed scenes once ignored --data and scored its own scenes."
    run, data = from_panns
    metadata = json.loads((run/'run.json').read_text())
    copy = shutil.copytree(run, tmp_path/'copy')
    (copy/'run.json').write_text(json.dumps(metadata | dict(profile=metadata['profile'] | dict(corpus='synthesised', n_train=32, n_val=8, n_test=24))))
    assert evaluate_on(Run(copy), data)['pool'] == evaluate_on(Run(run), data)['pool'] == dict(clips=8, captions=8)

def test_several_relevant_clips_per_caption(from_panns, tmp_path):
    run, data = from_panns
    one = json.loads(cmlf('evaluate', run, '--data', data, '--json').stdout)
    table = pd.read_csv(data)
    test = table[table.split == 'test']
    every = pd.DataFrame([(c, p) for c in test.caption for p in test.path], columns=['caption', 'file_name'])
    every.to_csv(tmp_path/'right.csv', index=False)
    all_relevant = json.loads(cmlf('evaluate', run, '--data', data, '--relevance', tmp_path/'right.csv', '--at', 16, '--json').stdout)
    assert all_relevant['t2a']['R@1'] == all_relevant['map']['t2a']['mAP@16'] == 100 >= one['t2a']['R@1']
    every.assign(file_name='none.wav').to_csv(tmp_path/'wrong.csv', index=False)
    assert_refused_after_facts(cmlf('evaluate', run, '--data', data, '--relevance', tmp_path/'wrong.csv'), 'wrong.csv row 2', 'none.wav')

# --- relative paths, from the command to the executed notebook

def test_relative_paths_work_to_the_end(tmp_path):
    tones(tmp_path/'own', [(n.replace('.wav', ' #1 <b>"x".wav') if s == 'test' else n, c, s) for n, c, s in some_rows()])
    weights = {k: v for k, v in ResNet38(4).state_dict().items()} | panns_front_end()
    torch.save(dict(model=weights), tmp_path/'weights.pth')
    ids = pd.read_csv(tmp_path/'own'/'manifest.csv').path
    for name, size in dict(audio=(10, 128), vggsound=(32, 512)).items():
        np.savez(tmp_path/f'{name}.npz', **{i: np.random.default_rng(0).normal(size=size) for i in ids})
    (tmp_path/'words.txt').write_text('tone ' + '0.1 ' * 300 + '\nnumber ' + '0.2 ' * 300 + '\n')
    paths = dict(panns='weights.pth', expert_features='audio=audio.npz,vggsound=vggsound.npz', words='words.txt')
    settings = [a for k, v in (paths | dict(corpus='manifest', seconds=1, pretrain_epochs=0)).items() for a in ('--set', f'{k}={v}')]
    done = cmlf('reproduce', '--profile', 'smoke', '--tables', '1', '--data', 'own/manifest.csv', '--runs', 'runs', '--out', 'report', *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path/'report'/'table1.csv')
    assert len(table) == 10 and table.t2a_r1.notna().all() and table.pool_clips.eq(8).all()
    assert str(tmp_path) not in (tmp_path/'report'/'notebooks'/'table1.ipynb').read_text(), 'the notebook contains a path of this machine'
    check_odd_names(tmp_path/'report')

def check_odd_names(report):
    "Clip ids with #, <b> and quotes are escaped in the page, and a browser finds their sounds."
    page = (report/'index.html').read_text()
    assert '#1 <b>"x"' not in page and '&lt;b&gt;' in page
    import re
    from urllib.parse import unquote
    sources = [unquote(s) for s in re.findall(r'<audio[^>]*src="([^"]+)"', page) if not s.startswith('data:')]
    assert len(sources) >= 6 and all((report/s).is_file() for s in sources)

# --- the report and stored settings

def test_report_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert report_folder('mini', 'x') == tmp_path/'x'

def test_unknown_stored_settings_are_named(from_panns, tmp_path):
    run, data = from_panns
    copy = shutil.copytree(run, tmp_path/'copy')
    metadata = json.loads((run/'run.json').read_text())
    (copy/'run.json').write_text(json.dumps(metadata | dict(profile=metadata['profile'] | dict(colour='blue'))))
    with pytest.raises(CmlfError, match='colour'): evaluate_on(Run(copy), data)
