"The `cmlf` command: help, results, and one line for each kind of bad input."
import json

import numpy as np
import pandas as pd
import pytest

from command import assert_refused, cmlf

@pytest.mark.parametrize('arguments, words', [
    (['reproduce', '--profile', 'minni'], ['minni', "did you mean 'mini'"]),
    (['reproduce', '--set', 'epoch=6'], ["'epoch'", "'epochs'"]),
    (['reproduce', '--set', 'epochs=six'], ['epochs', 'whole number']),
    (['reproduce', '--tables', '1,7'], ['7', '1, 2, 3']),
    (['reproduce', '--tables', 'one'], ['one']),
    (['reproduce', '--seeds', '0'], ['seeds']),
    (['reproduce', '--jobs', '-1'], ['jobs=-1']),
    (['mine', '/no/such.npy'], ['/no/such.npy', 'numpy.save']),
    (['mine', __file__], ['test_cli.py', 'holds no array']),
    (['reproduce', '--profile', 'field', '--events', '/no/such/folder'], ['/no/such/folder']),
    (['reproduce', '--profile', 'audiocaps'], ['--data']),
    (['reproduse'], ['reproduse']),
    (['reproduce', '--profle', 'mini'], ['--profle']),
])
def test_bad_input_gives_one_line(arguments, words, tmp_path):
    assert_refused(cmlf(*arguments, CMLF_RUNS=str(tmp_path)), *words)

def test_field_without_recordings_names_the_variable(tmp_path):
    assert_refused(cmlf('reproduce', '--profile', 'field', CMLF_RUNS=str(tmp_path), CMLF_ESC_DIR=''), 'CMLF_ESC_DIR')

def test_an_empty_folder_of_recordings_is_named(tmp_path):
    assert_refused(cmlf('reproduce', '--profile', 'field', '--events', tmp_path), str(tmp_path))

def test_help_of_every_command():
    for command in ('reproduce', 'data', 'mine', 'train', 'evaluate', 'serve', 'doctor'): assert cmlf(command, '--help').returncode == 0

def test_data_is_the_same_in_every_process(tmp_path):
    hashes = [json.loads(cmlf('data', '--profile', 'smoke', '--json', fresh=True, PYTHONHASHSEED=s).stdout)['hash'] for s in ('1', '2')]
    assert hashes[0] == hashes[1]

def test_a_corpus_written_out_can_be_read_back(tmp_path):
    from cmlf.layouts import load_corpus
    done = cmlf('data', '--profile', 'smoke', '--out', tmp_path/'corpus', '--json')
    facts = json.loads(done.stdout)
    again = load_corpus(tmp_path/'corpus'/'manifest.csv', 2.0)
    assert len(again.split('test')) == facts['test']['clips'] and len(again.split('test').captions) == facts['test']['captions']

def test_mine_your_own_vectors(tmp_path):
    vectors, groups, out = (tmp_path/f'{name}.npy' for name in ('vectors', 'groups', 'batches'))
    np.save(vectors, np.random.default_rng(0).normal(size=(100, 8)))
    np.save(groups, np.arange(100) // 4)
    done = cmlf('mine', vectors, '--batch-size', 16, '--kind', 'hard', '--groups', groups, '--out', out, '--json')
    facts, batches = json.loads(done.stdout), np.load(out)
    assert batches.dtype == np.int64 and batches.shape == (6, 16) and facts['dropped'] == 4
    assert len(np.unique(batches)) == 96 and all(len(set(b // 4)) == 16 for b in batches)
    assert facts['objective'] <= facts['bound'] and facts['gap'] == pytest.approx(facts['bound'] - facts['objective'])
    assert_refused(cmlf('mine', vectors, '--kind', 'hardest'), 'hardest', 'hard')
    assert_refused(cmlf('mine', vectors, '--out', tmp_path/'batches.csv'), 'batches.csv', '.npy')
    np.save(vectors, np.ones((64, 3)) + 1e-3 * np.random.default_rng(0).normal(size=(64, 3)))
    similar = cmlf('mine', vectors, '--batch-size', 16, '--near-duplicates', 0.9, '--no-bound', '--json')
    assert similar.returncode == 0 and '64 of 64 vectors are in one group' in similar.stderr and json.loads(similar.stdout)['spread'] == 1
    np.save(vectors, np.full((40, 3), np.nan))
    assert_refused(cmlf('mine', vectors), 'vector 0', 'not finite')

@pytest.fixture(scope='module')
def own_sounds(tmp_path_factory):
    "A manifest of 40 sounds with one caption each: tones of 8 pitches."
    import soundfile
    folder = tmp_path_factory.mktemp('own')
    rows = []
    for i in range(40):
        pitch = 200 * 1.5 ** (i % 8)
        wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(16000) / 16000) + 0.01 * np.random.default_rng(i).normal(size=16000)
        soundfile.write(folder/f'{i:02}.wav', wave, 16000)
        rows.append((f'{i:02}.wav', f'A tone of {pitch:.0f} hertz, number {i}', 'train' if i < 24 else 'val' if i < 32 else 'test'))
    pd.DataFrame(rows, columns=['path', 'caption', 'split']).to_csv(folder/'manifest.csv', index=False)
    return folder/'manifest.csv'

def test_train_and_evaluate_on_your_own_sounds(own_sounds, tmp_path):
    small = ['--set', 'width=4', '--set', 'text_model=tiny', '--set', 'text_frozen=0', '--set', 'epochs=3', '--set', 'stage_split=1+1+1', '--set', 'seconds=1']
    done = cmlf('train', '--data', own_sounds, '--profile', 'field', *small, '--system', '3cmlf', '--out', tmp_path/'run', '--json')
    assert done.returncode == 0, done.stderr
    assert 'batch_size 32 is lowered to 12' in done.stderr
    assert len(json.loads(done.stdout)['val']) == 3
    found = cmlf('evaluate', tmp_path/'run', '--data', own_sounds, '--split', 'test', '--json')
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert facts['pool'] == dict(clips=8, captions=8) and facts['coverage']['coverage'] == '8 of 8 clips'
    assert 0 <= facts['t2a']['R@1'] <= facts['t2a']['R@10'] == 100
    again = json.loads(cmlf('evaluate', tmp_path/'run', '--data', own_sounds, '--json').stdout)
    assert again['t2a'] == facts['t2a']
    assert_refused(cmlf('train', '--data', own_sounds, '--out', tmp_path/'run'), 'holds a finished run')

def test_bad_corpora_and_runs_give_one_line(own_sounds, tmp_path):
    assert_refused(cmlf('evaluate', tmp_path, '--data', own_sounds), str(tmp_path), 'cmlf train')
    assert_refused(cmlf('train', '--data', tmp_path/'none.csv', '--out', tmp_path/'run'), 'none.csv')
    broken = own_sounds.with_name('broken.csv')
    broken.write_text('path,caption,split\n00.wav,,train\n')
    assert_refused(cmlf('train', '--data', broken, '--out', tmp_path/'run'), 'broken.csv', '2')

def test_rows_with_missing_files_give_an_error_before_training(own_sounds, tmp_path):
    on_disk = ['reproduce', '--profile', 'smoke', '--set', 'corpus=manifest', '--data', own_sounds, '--runs', tmp_path]
    assert_refused(cmlf(*on_disk), 'PANNs', '--only')
    assert_refused(cmlf(*on_disk, '--only', '*scratch* experts* ce*'), 'expert_features', '--only')
    assert_refused(cmlf(*on_disk, '--set', 'panns=none.pth'), 'none.pth')
    assert not list(tmp_path.rglob('*.partial'))

def test_an_unreadable_file_is_named(own_sounds, tmp_path):
    "Unreadable files count as missing in the coverage report; if no clip is left, the error names a file."
    folder = tmp_path/'broken'
    folder.mkdir()
    (folder/'a.wav').write_text('no sound')
    (folder/'manifest.csv').write_text('path,caption,split\na.wav,a thing,train\n')
    assert_refused(cmlf('train', '--data', folder/'manifest.csv', '--out', tmp_path/'run'), 'a')

def test_doctor():
    done = cmlf('doctor', '--json', CMLF_ESC_DIR='/no/such')
    found = {c['what']: c for c in json.loads(done.stdout)}
    assert found['packaged MiniLM']['found'] and not found['recordings']['found'] and 'CMLF_ESC_DIR' in found['recordings']['text']
