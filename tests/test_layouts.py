"Layouts of corpora as they are distributed; damaged sound files; corpora that are written and read back."
import io, json, os, re, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from cmlf import data
from cmlf.appendix import probes
from cmlf.core import CmlfError
from cmlf.data import Clip, Corpus, pool_hash, read_relevance, safe_name, write_corpus
from cmlf.layouts import load_corpus, recognise
from cmlf.features import LogMel, build_store, load_audio

IDS = ['7fmOlUlwoNg', '-0Gj8-vB1q4', 'vfY_TJq7n_U', '__abc-DEF_1']
OFFICIAL = 'audiocap_id,youtube_id,start_time,caption\n'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CMLF_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def wave(hz=440.0, seconds=.5, rate=32000):
    return .1 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)


def tone(path, hz=440.0, seconds=.5, rate=32000, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, wave(hz, seconds, rate), rate, **kw)
    return path


def write(path, text, encoding='utf-8'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def error_of(f, *args, **kwargs):
    with pytest.raises(CmlfError) as e: f(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


# --- AudioCaps as aac-datasets lays it out today, and AudioCaps 2.0

def audiocaps(folder):
    write(folder/'train.csv', OFFICIAL + f'1,{IDS[0]},30,"Rain, wind"\n2,{IDS[1]},0,A lion\n')
    write(folder/'val.csv', OFFICIAL + f'3,{IDS[2]},130,A dog\n4,{IDS[2]},130,A dog\n')
    write(folder/'test.csv', OFFICIAL + f'5,{IDS[3]},5,a1\n6,{IDS[3]},5,b2\n')
    return folder


def aac_sounds(root, starts=(30, 0, 130, 5)):
    for i, (id, start, split) in enumerate(zip(IDS, starts, ('train', 'train', 'val', 'test'))):
        tone(root/'audio_32000Hz'/split/f'{id}_{start}.flac', 200 + 50 * i)


@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_aac_datasets_layout(tmp_path, version):
    root = tmp_path/'AUDIOCAPS'
    audiocaps(root/f'csv_files_{version}')
    write(root/f'csv_files_{version}'/'train_fixed.csv', OFFICIAL + '9,zzzzzzzzzzz,1,Not asked for\n')
    write(root/'class_labels_indices.csv', 'index,mid,display_name\n0,/m/09x0r,Speech\n')
    aac_sounds(root)
    official = audiocaps(tmp_path/'official')
    for i, id in enumerate(IDS): tone(official/'audio'/f'{id}.flac', 200 + 50 * i)
    expected = load_corpus(official, .5)
    for path in (tmp_path/'AUDIOCAPS', root/f'csv_files_{version}'):
        c = load_corpus(path, .5)
        assert c.name == 'audiocaps' and c.coverage == '4 of 4 clips' and c.hash == expected.hash
        assert 'audio_32000Hz' in c.clips[0].source and c.clips[2].captions == ('a dog', 'a dog')


def test_both_versions_side_by_side_are_refused(tmp_path):
    for v in ('v1', 'v2'): audiocaps(tmp_path/'AUDIOCAPS'/f'csv_files_{v}')
    aac_sounds(tmp_path/'AUDIOCAPS')
    for path in (tmp_path, tmp_path/'AUDIOCAPS'):
        message = error_of(load_corpus, path, .5)
        assert 'csv_files_v1 and ' in message and 'csv_files_v2; give one of these folders' in message and 'layout=' not in message
    assert len(load_corpus(tmp_path/'AUDIOCAPS'/'csv_files_v2', .5)) == 4


def test_audiocaps_2(tmp_path):
    audiocaps(tmp_path/'audiocaps'/'dataset2.0')
    for i, id in enumerate(IDS): tone(tmp_path/'audiocaps'/'audio'/f'{id}.wav', 200 + 50 * i)
    for path in (tmp_path/'audiocaps', tmp_path/'audiocaps'/'dataset2.0'):
        assert load_corpus(path, .5).coverage == '4 of 4 clips'
    audiocaps(tmp_path/'audiocaps'/'dataset')
    assert 'dataset and ' in error_of(load_corpus, tmp_path/'audiocaps', .5)


# --- WavCaps

def wavcaps_json(path, items, **more):
    return write(path, json.dumps(dict(num_captions_per_audio=1, data=[
        dict(title='t', description='d {x} [y]', author='a', href='h', caption=c, id=i, duration=.5, audio='wav_path') | more
        for i, c in items])))


def test_wavcaps_json_beside_its_flac(tmp_path):
    file = wavcaps_json(tmp_path/'sb_final.json', [('2219', 'An airplane is landing.'), ('2218.wav', 'A bell.'), (2217, 'Rain.'), ('2216.flac', 'Wind.')])
    for i in (2219, 2218, 2216): tone(tmp_path/'flac'/f'{i}.flac', i / 5)
    for path in (file, tmp_path):
        c = load_corpus(path, .5)
        assert c.name == 'wavcaps' and [x.id for x in c.clips] == ['2219', '2218', '2216'] and c.coverage == '3 of 4 clips'
        assert c.clips[0].where == f'{file} row 1' and 'split 80/10/10 by hash' in c.description
    assert c.missing[0].id == '2217' and c.waveform(0).any()


def test_wavcaps_audioset_ids(tmp_path):
    wavcaps_json(tmp_path/'as_final.json', [(f'Y{i}.wav', f'Sound {i}') for i in IDS])
    for i in IDS: tone(tmp_path/'AudioSet_SL'/f'Y{i}.flac', 300 + ord(i[2]))
    c = load_corpus(tmp_path, .5)
    assert [x.id for x in c.clips] == [f'Y{i}' for i in IDS] and c.name == 'wavcaps'


def test_wavcaps_of_several_sources(tmp_path):
    root = tmp_path/'WavCaps'
    for source, file in (('SoundBible', 'sb_final'), ('FreeSound', 'fsd_final'), ('BBC_Sound_Effects', 'bbc_final')):
        wavcaps_json(root/'json_files'/source/f'{file}.json', [('17', f'Of {source}')])
        if source[0] != 'B': tone(root/'Audio'/source/'17.flac', 300 + len(source))
    write(root/'json_files'/'blacklist'/'blacklist_exclude_all_ac.json', '{"AudioSet": ["Yr1nicOVtvkQ.wav"]}')
    for path in (root, tmp_path):
        c = load_corpus(path, .5)
        assert {x.id: Path(x.source).parent.name for x in c.clips} == {'FreeSound/17': 'FreeSound', 'SoundBible/17': 'SoundBible'}
        assert c.missing[0].id == 'BBC/17' and c.coverage_report.reason[c.coverage_report.id == 'BBC/17'].item().startswith('only found as')
    one = load_corpus(root/'json_files'/'SoundBible'/'sb_final.json', .5)
    assert [x.id for x in one.clips] == ['17'] and 'SoundBible' in one.clips[0].source


def test_json_with_several_captions_real_paths_and_splits(tmp_path):
    for split in ('train', 'test'):
        items = [dict(caption_1='One', caption_2='Two', audio=f'/old/disk/Santa {split}.wav', id=f'1166{len(split)}', duration=1)]
        write(tmp_path/f'{split}.json', json.dumps(dict(num_captions_per_audio=2, data=items)))
        tone(tmp_path/'waveforms'/f'Santa {split}.wav', 300 + len(split))
    c = load_corpus(tmp_path, .5)
    assert sorted((x.split, x.captions) for x in c.clips) == [('test', ('one', 'two')), ('train', ('one', 'two'))]


def test_bad_wavcaps(tmp_path):
    message = lambda text: error_of(load_corpus, write(tmp_path/'x.json', text), .5)
    assert 'x.json row 2: caption is empty' in message('{"data": [{"id": "1", "caption": "Rain"}, {"id": "2", "caption": " "}]}')
    assert "x.json row 2: id '1' was already in" in message('{"data": [{"id": "1", "caption": "Rain"}, {"id": "1.wav", "caption": "Rain"}]}')
    for id in ('', '"id": null, ', '"id": "", '): assert 'x.json row 1: id is empty' in message(f'{{"data": [{{{id}"caption": "Rain"}}]}}')
    assert 'not JSON' in message('{"data": [{"id": "1", "caption": "Rain"}, {"id"')
    assert 'a JSON list of 1 object with keys path, caption' in message('[{"path": "a.wav", "caption": "Rain"}]')
    assert 'a JSON list of 2 objects with keys wav' in message('[{"wav": 1}, {"wav": 2}]')
    assert 'a JSON object with keys audio; audio is a JSON list of 1 object with keys a' in message('{"audio": [{"a": 1}]}')
    assert 'a .json file that is not JSON' in message('{"audio"')


# --- parquet with the sound inside

def encoded(hz, format='FLAC', seconds=.5):
    out = io.BytesIO()
    sf.write(out, wave(hz, seconds), 32000, format=format)
    return out.getvalue()


def hub(path, group=2, **columns):
    "A parquet file as written by Hugging Face; `audio` has (bytes, path) of each row."
    import pyarrow as pa, pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    table = {k: v for k, v in columns.items() if k != 'audio'}
    table['audio'] = pa.array([dict(bytes=b, path=p) for b, p in columns['audio']], struct)
    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


def test_sound_inside_parquet(tmp_path, cache):
    sounds = {n: encoded(200 + 40 * i, f) for i, (n, f) in enumerate([('a.flac', 'FLAC'), ('b.wav', 'WAV'), ('c.ogg', 'OGG'), ('d.mp3', 'MP3'), ('e.wav', 'WAV')])}
    pair = lambda *names: [(sounds[n], n) for n in names]
    hub(tmp_path/'hf'/'data'/'train-00000-of-00002.parquet', audio=pair('a.flac', 'b.wav'), caption=['Rain', 'Wind'], duration=[1., 2.])
    hub(tmp_path/'hf'/'data'/'train-00001-of-00002.parquet', audio=pair('c.ogg'), caption=['Hail'], duration=[1.])
    hub(tmp_path/'hf'/'data'/'validation-00000-of-00001.parquet', audio=pair('d.mp3'), caption=['Sun'], duration=[1.])
    hub(tmp_path/'hf'/'data'/'test-00000-of-00001.parquet', audio=pair('e.wav'), caption=['Fog'], duration=[1.])
    write(tmp_path/'hf'/'README.md', '# A dataset'); write(tmp_path/'hf'/'hf.py', 'raise SystemExit("executed")')
    c = load_corpus(tmp_path/'hf', .5)
    assert sorted(x.id for x in c.clips) == ['test/e', 'train/a', 'train/b', 'train/c', 'val/d'] and c.splits == ('train', 'val', 'test')
    files = [tmp_path/n for n in sounds]
    for f in files: f.write_bytes(sounds[f.name])
    of = {x.id.split('/')[1]: i for i, x in enumerate(c.clips)}
    for f in files:
        assert np.array_equal(c.waveform(of[f.stem]), load_audio(f, .5)) and c.keys[of[f.stem]] == data.file_hash(f)
    assert c.clips[of['b']].where == f'{tmp_path}/hf/data/train-00000-of-00002.parquet row 2'
    assert load_corpus(tmp_path/'hf'/'data', .5).hash == c.hash
    assert load_corpus(tmp_path/'hf', .5, audio=False).captions == c.captions


def read_in_another_process(read, clip, queue): queue.put(float(np.abs(read(clip)).max()))


def test_sound_inside_parquet_is_copied_once_and_read_anywhere(tmp_path, cache, monkeypatch):
    import multiprocessing as mp
    file = hub(tmp_path/'d'/'train-0.parquet', audio=[(encoded(300 + i), f'{i}.flac') for i in range(5)], caption=list('abcde'))
    load_corpus(tmp_path/'d', .5, audio=False)
    assert not (cache/'sounds').exists()  # captions alone cost no disk
    c = load_corpus(tmp_path/'d', .5)
    queue = mp.get_context('spawn').Queue()
    child = mp.get_context('spawn').Process(target=read_in_another_process, args=(c.read, c.clips[3], queue))
    child.start()
    assert abs(queue.get(timeout=120) - .1) < .01
    child.join()
    copies = []
    monkeypatch.setattr(probes, '_save_sound', lambda *a, real=probes._save_sound: copies.append(1) or real(*a))
    assert load_corpus(tmp_path/'d', .5).hash == c.hash and not copies
    Path(c.clips[2].source).unlink()  # the cache may be cleared
    assert load_corpus(tmp_path/'d', .5).hash == c.hash and len(copies) == 5
    assert file.exists()


def test_copying_resumes_and_needs_space(tmp_path, cache, monkeypatch):
    hub(tmp_path/'d'/'train-0.parquet', audio=[(encoded(300 + i), f'{i}.flac') for i in range(5)], caption=list('abcde'))
    def interrupted_copy(folder, sound, real=probes._save_sound):
        if sound['path'] == '3.flac': raise KeyboardInterrupt
        return real(folder, sound)
    with monkeypatch.context() as m:
        m.setattr(probes, '_save_sound', interrupted_copy)
        with pytest.raises(KeyboardInterrupt): load_corpus(tmp_path/'d', .5)
    assert not list((cache/'sounds').glob('*.json'))
    with monkeypatch.context() as m:
        m.setattr(probes.shutil, 'disk_usage', lambda p: type('', (), dict(free=10)))
        assert 'train-0.parquet: its sound needs 0.0 GB' in error_of(load_corpus, tmp_path/'d', .5)
    assert len(load_corpus(tmp_path/'d', .5)) == 5


def test_row_groups_are_copied_one_by_one(tmp_path):
    import pyarrow as pa
    noise = np.random.default_rng(0)
    file = hub(tmp_path/'train-0.parquet', 4, audio=[(noise.bytes(500_000), f'{i}.wav') for i in range(80)], caption=['x'] * 80)
    del noise
    before, most = pa.total_allocated_bytes(), 0
    for _ in probes._sounds_in(file): most = max(most, pa.total_allocated_bytes() - before)
    assert most < 12e6  # six times a group of 2 MB, of 40 MB in all


def test_audiocaps_as_parquet_shares_its_pool(tmp_path):
    official = audiocaps(tmp_path/'official')
    blobs = {id: encoded(200 + 50 * i) for i, id in enumerate(IDS)}
    for id, blob in blobs.items():
        (official/'audio').mkdir(exist_ok=True)
        (official/'audio'/f'{id}.flac').write_bytes(blob)
    for split in ('train', 'val', 'test'):  # one row per caption, as its mirrors have it
        t = pd.read_csv(official/f'{split}.csv')
        hub(tmp_path/'hf'/'data'/f'{split}-00000-of-00001.parquet', audiocap_id=t.audiocap_id.tolist(), youtube_id=t.youtube_id.tolist(),
            start_time=t.start_time.tolist(), caption=t.caption.tolist(), audio=[(blobs[i], None) for i in t.youtube_id])
    a, b = load_corpus(official, .5), load_corpus(tmp_path/'hf', .5)
    order = {x.id: x for x in b.clips}
    assert b.name == 'audiocaps' and a.split('test').pool == b.split('test').pool
    assert [order[x.id].captions for x in a.clips] == [x.captions for x in a.clips]


def test_parquet_names_of_clips(tmp_path):
    def ids(**columns):
        n = len(columns['audio'])
        hub(tmp_path/f'{len(list(tmp_path.iterdir()))}'/'t.parquet', caption=[['One', 'Two']] * n, **columns)
        return [c.id for c in load_corpus(max(tmp_path.glob('*/t.parquet'), key=os.path.getmtime), .5, audio=False).clips]
    two = [(encoded(300), 'x/Y7fmOlUlwoNg.wav'), (encoded(400), 'Y-0Gj8-vB1q4.wav')]
    assert ids(audio=two) == IDS[:2]
    assert ids(audio=two, id=[7, 8]) == ['7', '8']
    assert ids(audio=[(b, 'My sound.wav') if not i else (b, 'b.wav') for i, (b, _) in enumerate(two)], split=['train', 'test']) == ['train/My sound', 'test/b']
    assert ids(audio=[(b, None) for b, _ in two], split=['train', 'test']) == ['train/t.parquet row 1', 'test/t.parquet row 2']


def test_ids_that_start_again_in_each_split(tmp_path):
    for s in ('train', 'test'): hub(tmp_path/'data'/f'{s}-0.parquet', id=[0, 1], caption=['a', 'b'], audio=[(encoded(300), 'x.wav')] * 2)
    assert sorted(c.id for c in load_corpus(tmp_path, .5, audio=False).clips) == ['test/0', 'test/1', 'train/0', 'train/1']


def test_bad_parquet_with_sound(tmp_path):
    same = [(encoded(300), 'a.wav'), (encoded(400), 'a.wav')]
    file = hub(tmp_path/'a'/'train-0.parquet', audio=same, caption=['Rain', 'Wind'])
    assert "train-0.parquet row 2: clip 'train/a' has another sound than in" in error_of(load_corpus, file, .5)
    file = hub(tmp_path/'b'/'train-0.parquet', audio=same, label=['Rain', 'Wind'])
    assert 'no column caption or text; it has label, audio' in error_of(load_corpus, file, .5)
    file = hub(tmp_path/'c'/'train-0.parquet', audio=[same[0], (encoded(400), 'b.wav')], text=['Rain', ''])
    assert 'train-0.parquet row 2: caption is empty' in error_of(load_corpus, file, .5)
    hub(tmp_path/'d'/'data'/'train-00000-of-00003.parquet', audio=same[:1], text=['Rain'])
    assert 'only 1 of 3 files of data/train' in load_corpus(tmp_path/'d', .5).description
    half = tmp_path/'d'/'data'/'train-00001-of-00003.parquet'
    half.write_bytes((tmp_path/'d'/'data'/'train-00000-of-00003.parquet').read_bytes()[:500])
    assert 'train-00001-of-00003.parquet: not parquet' in error_of(load_corpus, tmp_path/'d', .5)
    nothing = hub(tmp_path/'e'/'train-0.parquet', audio=[(None, 'a.wav'), (encoded(400), 'b.wav'), (b'no sound', 'c.wav')], text=['Rain', 'Wind', 'Hail'])
    c = load_corpus(nothing, .5)
    assert c.coverage_report.status.tolist() == ['missing', 'present', 'unreadable'] and c.coverage_report.reason[0] == 'no sound in its row'


def test_missing_pyarrow_is_named(tmp_path, monkeypatch):
    file = hub(tmp_path/'hf'/'data'/'train-0.parquet', audio=[(encoded(300), 'a.wav')], caption=['Rain'])
    write(tmp_path/'hf'/'metadata.csv', 'file_name,text\na.wav,Rain\n')  # needs none
    for name in ('pyarrow', 'pyarrow.parquet'): monkeypatch.setitem(sys.modules, name, None)
    assert "parquet needs pyarrow; pip install 'cmlf[data]'" in error_of(load_corpus, file, .5)
    assert "parquet needs pyarrow; pip install 'cmlf[data]'" in error_of(recognise, file.parent)
    assert recognise(tmp_path/'hf')[0].name == 'audiofolder'


def test_one_sound_in_two_rows_is_one_group(tmp_path):
    c = load_corpus(hub(tmp_path/'t.parquet', id=[1, 2, 3], audio=[(encoded(300), 'a.wav'), (encoded(400), 'b.wav'), (encoded(300), 'c.wav')],
                        caption=['Rain', 'Wind', 'Hail'], split=['train'] * 3), .5)
    assert len(c) == 3 and len(set(c.groups())) == 2 and c.groups()[0] == c.groups()[2]


# --- audiofolder

@pytest.mark.parametrize('ext', ['csv', 'jsonl', 'parquet'])
@pytest.mark.parametrize('where', ['each split', 'data', 'top'])
def test_audiofolder(tmp_path, ext, where):
    def table(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        if ext == 'csv': pd.DataFrame(rows).to_csv(path, index=False)
        elif ext == 'parquet': pd.DataFrame(rows).to_parquet(path)
        else: write(path, ''.join(json.dumps(r) + '\n' for r in rows))
    root = tmp_path/'data' if where == 'data' else tmp_path
    every = []
    for i, split in enumerate(('train', 'validation', 'test')):
        for k in range(2): tone(root/split/'audio'/f'{k}.wav', 300 + 40 * i + 90 * k)
        rows = [dict(file_name=f'audio/{k}.wav', text=f'Sound {chr(97 + i + 5 * k)}') for k in range(2)]
        if where == 'top': every += [dict(r, file_name=f'{split}/{r["file_name"]}') for r in rows]
        else: table(root/split/f'metadata.{ext}', rows)
    if every: table(root/f'metadata.{ext}', every)
    c = load_corpus(tmp_path, .5)
    assert c.splits == ('train', 'val', 'test') and c.coverage == '6 of 6 clips' and 'hash' not in c.description
    assert sorted(x.captions for x in c.split('val').clips) == [('sound b',), ('sound g',)] and c.name == tmp_path.name.lower()


def test_audiofolder_of_one_split_and_of_none(tmp_path):
    tone(tmp_path/'train'/'a.wav'), tone(tmp_path/'my test corpus'/'a.wav')
    for folder in ('train', 'my test corpus'): write(tmp_path/folder/'metadata.jsonl', '{"file_name": "a.wav", "caption": ["Rain", "It rains"]}\n')
    c = load_corpus(tmp_path/'train', .5)
    assert c.clips[0].split == 'train' and c.clips[0].captions == ('rain', 'it rains') and 'hash' not in c.description
    assert 'split 80/10/10 by hash' in load_corpus(tmp_path/'my test corpus', .5).description


def test_bad_audiofolder(tmp_path):
    message = lambda text: error_of(load_corpus, write(tmp_path/'x'/'metadata.jsonl', text).parent, .5)
    assert 'metadata.jsonl row 2: not JSON' in message('{"file_name": "a.wav", "text": "Rain"}\n{"file_name": "b.wa')
    assert 'metadata.jsonl row 2: ' in message('{"file_name": "a.wav", "text": "Rain"}\n["b.wav"]\n')
    assert 'none of 1 clips has usable sound, e.g. a.wav: no such file' in message('{"file_name": "a.wav", "text": "Rain"}\n')
    assert 'metadata.jsonl row 2: file_name is None, not text' in message('{"file_name": "a.wav", "text": "Rain"}\n{"text": "Wind"}\n')
    assert 'caption is 3, not text' in message('{"file_name": "a.wav", "text": 3}\n')


# --- manifests with tabs or semicolons

@pytest.mark.parametrize('separator', ['\t', ';', ','])
@pytest.mark.parametrize('path', ['file_name', 'audio', 'path'])
@pytest.mark.parametrize('caption', ['caption', 'text'])
@pytest.mark.parametrize('eol,bom', [('\r\n', '\ufeff'), ('\n', '')])
def test_manifests_with_other_column_names(tmp_path, separator, path, caption, eol, bom):
    rows = [[path, caption, 'split'], ['a.wav', '"Rain, wind; hail"', 'train'], ['b.wav', '"A ""bell"""', 'test']]
    for n, hz in (('a', 300), ('b', 400)): tone(tmp_path/f'{n}.wav', hz)
    c = load_corpus(write(tmp_path/'m.tsv', bom + ''.join(separator.join(r) + eol for r in rows)), .5)
    assert c.captions == ['rain wind hail', 'a bell'] and c.coverage == '2 of 2 clips'


def test_manifest_files_of_a_folder(tmp_path):
    tone(tmp_path/'a.wav')
    for name, text in (('manifest.tsv', 'audio\ttext\na.wav\tA man says "hi" twice\n'), ('manifest.jsonl', '{"audio": "a.wav", "text": "Rain"}\n')):
        write(tmp_path/name, text)
        assert len(load_corpus(tmp_path, .5)) == 1
        (tmp_path/name).unlink()
    write(tmp_path/'manifest.csv', 'audio;text\na.wav;Rain\nb.wav;Wind; cold\n')
    assert 'row 3: 3 fields where the header has 2; a semicolon is not quoted' in error_of(load_corpus, tmp_path, .5)


def test_the_message_describes_the_folder(tmp_path):
    message = lambda path: error_of(load_corpus, path, .5)
    assert 'a .wav file; no corpus found' in message(tone(tmp_path/'a.wav'))
    assert "m.csv row 1: no column 'path'; it has wav, words" in message(write(tmp_path/'x'/'m.csv', 'wav,words\na.wav,Rain\n'))
    assert 'a folder with 1 .csv; m.csv with columns wav, words; no corpus found; looked for' in message(tmp_path/'x')
    (tmp_path/'empty').mkdir()
    assert 'a folder with nothing; no corpus found' in message(tmp_path/'empty')
    assert 'a .zip file; no corpus found' in message(write(tmp_path/'a.zip', 'PK'))


# --- sound files that are damaged, not seekable or silent, or whose channels cancel

def test_a_corpus_of_difficult_sound(tmp_path, capsys):
    x = np.random.default_rng(0).uniform(-.5, .5, 64000)
    put = lambda name, wave, **kw: sf.write(tmp_path/name, wave, kw.pop('rate', 32000), **kw)
    put('fine.flac', x); put('phone.wav', x[::4], rate=8000, subtype='GSM610'); put('cancel.wav', np.stack([x, -x], 1))
    put('silent.flac', 0 * x); put('clipped.wav', np.clip(9 * x, -1, 1)); put('broken.flac', x); put('half.wav', x); put('nan.wav', x * np.nan, subtype='FLOAT')
    damaged = bytearray((tmp_path/'broken.flac').read_bytes())
    damaged[len(damaged) // 2:len(damaged) // 2 + 2000] = bytes(2000)  # its end is as it was
    (tmp_path/'broken.flac').write_bytes(damaged)
    (tmp_path/'half.wav').write_bytes((tmp_path/'half.wav').read_bytes()[:64000])
    names = ['fine.flac', 'phone.wav', 'cancel.wav', 'silent.flac', 'clipped.wav', 'broken.flac', 'half.wav', 'nan.wav']
    c = load_corpus(write(tmp_path/'m.csv', 'path,caption,split\n' + ''.join(f'{n},Sound of {n[:-4]},train\n' for n in names)), 2)
    status, reason = (dict(zip(c.coverage_report.id, c.coverage_report[k])) for k in ('status', 'reason'))
    assert [n for n in names if status[n] == 'unreadable'] == ['broken.flac', 'half.wav', 'nan.wav']
    assert c.coverage == '5 of 8 clips' and [x.id for x in c.clips] == names[:5] and [x.id for x in c.missing] == names[5:]
    assert reason['cancel.wav'] == 'channels cancel, took the loudest' and reason['silent.flac'] == 'silent'
    assert reason['clipped.wav'].startswith('clipped, ') and reason['phone.wav'] == reason['fine.flac'] == ''
    assert np.allclose(c.waveform(2), c.waveform(0), atol=1e-3)
    logged = capsys.readouterr().err
    assert '5 of 8 train clips; 3 unreadable; 1 silent; 1 clipped; 1 with channels that cancel' in logged
    store = build_store(tmp_path/'store', c.keys, c.waveform, LogMel(), 2, workers=2)  # all that is counted can be read
    assert len(store) == 5


def test_a_file_damaged_after_loading_is_named(tmp_path):
    for n in 'ab': tone(tmp_path/f'{n}.flac', 300 + ord(n), 2)
    c = load_corpus(write(tmp_path/'m.csv', 'path,caption,split\na.flac,Rain,train\nb.flac,Wind,train\n'), 2)
    (tmp_path/'b.flac').write_bytes((tmp_path/'b.flac').read_bytes()[:4000])
    for read in (lambda: c.waveform(1), lambda: build_store(tmp_path/'store', c.keys, c.waveform, LogMel(), 2, workers=2)):
        message = error_of(read)
        assert message.startswith("clip 'b.flac': ") and 'b.flac: cut off' in message and 'load the corpus again' in message
    assert load_corpus(tmp_path/'m.csv', 2).coverage == '1 of 2 clips'


def test_probes_of_an_older_version_are_not_used(tmp_path, cache, monkeypatch):
    file = tone(tmp_path/'a.wav')
    m = write(tmp_path/'m.csv', 'path,caption,split\na.wav,Rain,train\n')
    stat = file.stat()
    result = dict(seconds=9.0, rate=8000, sha256='old', error='', remark='')
    write(cache/'probes.jsonl', ''.join(json.dumps(line) + '\n' for line in (
        [str(file), stat.st_size, stat.st_mtime_ns, result], [probes.PROBE_VERSION - 1, .5, str(file), stat.st_size, stat.st_mtime_ns, result], 7, 'x')))
    probed = []
    monkeypatch.setattr(probes, 'probe', lambda *a, real=probes.probe: probed.append(a) or real(*a))
    assert load_corpus(m, .5).coverage_report.rate[0] == 32000 and len(probed) == 1
    load_corpus(m, .5)
    assert len(probed) == 1
    load_corpus(m, .4)  # other seconds are decoded
    assert len(probed) == 2


def test_only_the_used_seconds_have_to_be_whole(tmp_path):
    tone(tmp_path/'a.flac', 300, 9)
    (tmp_path/'a.flac').write_bytes((tmp_path/'a.flac').read_bytes()[:-9000])
    m = write(tmp_path/'m.csv', 'path,caption,split\na.flac,Rain,train\n')
    assert load_corpus(m, 1).coverage_report.reason[0] == '9.00 s, cut to 1 s; cut off after the used part'
    assert 'none of 1 clips has usable sound' in error_of(load_corpus, m, 9)


# --- written out, and read back

def written(tmp_path, corpus):
    return load_corpus(write_corpus(corpus, tmp_path/'out'), corpus.seconds)


def facts(corpus): return [(c.id, c.split, c.captions, c.meaning, c.tags, c.credit) for c in corpus.clips]


def test_a_written_corpus_is_read_back(tmp_path):
    sounds = tmp_path/'mine'/'sounds'
    ids = ['rain.wav', 'Rain.flac', '../up/Löwe brüllt.wav', str(tmp_path/'abs'/'a.wav'), 'CON', 'q?*:|.wav', 'a/b.wav', 'a_b.wav', '.hidden', '猫', '-x', 'x' * 300]
    rows = [dict(path=str(tone(sounds/f'{i}.wav', 200 + 30 * i)), id=id, caption_1=f'Sound {chr(97 + i)}, "loud"',
                 caption_2='Shared' if i % 3 == 0 else None, split=('train', 'val', 'test')[i % 3], meaning='m' if i in (1, 2) else '',
                 tags='dog;big cat' if i == 4 else '', credit='Zoë, CC0' if i == 5 else '') for i, id in enumerate(ids)]
    pd.DataFrame(rows).to_csv(tmp_path/'mine'/'manifest.csv', index=False)
    c = load_corpus(tmp_path/'mine', .5)
    before = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if 'cache' not in p.parts)
    again = written(tmp_path, c)
    new = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if 'cache' not in p.parts} - set(before)
    assert all(p == 'out' or p.startswith('out/') and p.count('/') == 1 for p in new) and len(new) == len(ids) + 2
    assert facts(again) == facts(c) and again.groups().tolist() == c.groups().tolist()
    assert again.pool == c.pool and again.tags == c.tags
    for i in range(len(c)): assert np.allclose(again.waveform(i), c.waveform(i), atol=1e-4)
    names = [Path(x.source).name for x in again.clips]
    assert all(re.fullmatch(r'[A-Za-z0-9_-][A-Za-z0-9._-]{0,110}\.wav', n) for n in names) and not any('.wav.wav' in n for n in names)
    assert len({n.lower() for n in names}) == len(ids) and names[4].lower() != 'con.wav' and names[2].startswith('up_Lowe_brullt-')


def test_names_do_not_depend_on_order_and_stay_plain(tmp_path):
    assert [safe_name(t) for t in ('rain', 'train-00012', '-0Gj8-vB1q4', 'a.b_c')] == ['rain', 'train-00012', '-0Gj8-vB1q4', 'a.b_c']
    for odd in ('', '.', '..', '../a', 'a/b', 'a b', 'nul', 'COM1.txt', 'é', 'a' * 99, 'a\0b', 'a\nb'):
        name = safe_name(odd)
        assert name == safe_name(odd) and re.fullmatch('[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}', name) and name != odd
    ids = ['Rain', 'rain', 'RAIN.wav', 'wind']
    assert sorted(data._file_names(ids)) == sorted(data._file_names(ids[::-1])) and data._file_names(ids)[3] == 'wind'
    assert len({n.lower() for n in data._file_names(ids)}) == 4


def test_existing_files_are_not_overwritten(tmp_path):
    for i, n in enumerate(('rain.wav', 'wind.wav')): tone(tmp_path/n, 300 + 50 * i, .3, subtype='FLOAT')
    manifest = write(tmp_path/'manifest.csv', 'path,caption,split\nrain.wav,Rain,train\nwind.wav,Wind,test\n')
    c = load_corpus(tmp_path, .5)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert 'rain.wav: exists with other content; give a new folder' in error_of(write_corpus, c, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before and manifest in before


def test_interrupted_writing_resumes(tmp_path):
    for i, n in enumerate('ab'): tone(tmp_path/f'{n}.wav', 300 + 50 * i)
    c = load_corpus(write(tmp_path/'manifest.csv', 'path,caption,split\na.wav,Rain,train\nb.wav,Wind,test\n'), .5)
    def interrupted_copy(clip, real=c.read):
        if clip.id == 'b.wav': raise KeyboardInterrupt
        return real(clip)
    with pytest.raises(KeyboardInterrupt): write_corpus(Corpus('x', c.clips, interrupted_copy, .5), tmp_path/'out')
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['a.wav']
    assert facts(written(tmp_path, c)) == facts(c) and write_corpus(c, tmp_path/'out').exists()


def test_symbolic_links_are_not_followed(tmp_path):
    outside = write(tmp_path/'outside.wav', 'mine')
    tone(tmp_path/'a.wav')
    c = load_corpus(write(tmp_path/'m.csv', 'path,caption,split\na.wav,Rain,train\n'), .5)
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'a.wav').symlink_to(outside)
    error_of(write_corpus, c, tmp_path/'out')
    assert outside.read_text() == 'mine'


def test_composed_corpora_are_written_too(tmp_path):
    from cmlf.config import get_profile
    from cmlf.soundscapes import compose
    c = compose(get_profile('smoke', dict(n_train=6, n_val=2, n_test=2)))
    again = written(tmp_path, c)
    assert facts(again) == facts(c) and again.groups().tolist() == c.groups().tolist()


# --- several right clips for one caption

def clotho(tmp_path, missing=()):
    rows = ''.join(f'{n},{a},{b}\n' for n, a, b in (("Door.wav", "A door", "It creaks"), ("Pensol - le Moulin cours d'eau.wav", "Water flows", "A brook"),
                                                    (" Rain.wav", "Rain falls", "A brook"), ("Wind.wav", "Wind", "It blows")))
    write(tmp_path/'clotho_captions_evaluation.csv', 'file_name,caption_1,caption_2\n' + rows)
    for i, n in enumerate(("Door.wav", "Pensol - le Moulin cours d'eau.wav", " Rain.wav", "Wind.wav")):
        if n not in missing: tone(tmp_path/'clotho_audio_evaluation'/n, 300 + 50 * i)
    return load_corpus(tmp_path, .5).split('test')


OWN = [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]


def right(**more): return [own | set(more.get(f'c{k}', ())) for k, own in enumerate(OWN)]


def test_right_pairs_in_every_form(tmp_path):
    c = clotho(tmp_path)
    expected = right(c0=[3], c3=[2, 0], c5=[2, 0])  # "A brook" is a caption of two clips
    path = [c.clips[i].source for i in (3, 2, 0)]
    forms = {'caption,file_name': ['A door!,Wind.wav', 'a brook, Rain.wav', 'A brook,Door.wav'],
             'file_name;caption': ['Wind;A door', 'Rain.wav;A brook', 'evaluation/Door.wav;A brook'],
             'id\tcaption': ['test/Wind\tA door', 'test/ Rain\tA brook', 'test/Door\tA brook'],
             'clip,caption,note': ['Wind.wav,A door,x', 'Rain,A brook,y', 'Door,A brook,z'],
             'path,caption': [f'{path[0]},A door', f'{path[1]},A brook', f'{path[2]},A brook'],
             'query,audio_filenames': ["A door,\"['Wind.wav', 'Door.wav']\"", "A brook,\"[' Rain.wav', 'Door.wav']\""]}
    for head, rows in forms.items():
        assert read_relevance(write(tmp_path/'right.csv', '\n'.join([head, *rows, ''])), c) == expected, head
    lines = [dict(caption='A door', clip='Wind.wav'), dict(caption='A brook', clip=['Rain.wav', 'Door'])]
    assert read_relevance(write(tmp_path/'right.jsonl', '\n'.join(map(json.dumps, lines))), c) == expected
    as_json = write(tmp_path/'right.json', json.dumps({'A door': 'Wind.wav', 'A brook': ['Rain.wav', 'test/Door']}))
    assert read_relevance(as_json, c) == expected


def test_right_pairs_with_the_names_that_dcase_writes(tmp_path):
    c = clotho(tmp_path)
    text = 'query,audio_filenames\nWind,"[\'Pensol - le Moulin cours d&#39;eau.wav\', \'Wind.wav\']"\n'
    assert read_relevance(write(tmp_path/'eval.csv', text), c) == right(c6=[1])


def test_right_pairs_of_clips_without_sound_are_left_out(tmp_path):
    c = clotho(tmp_path, missing=['Door.wav'])
    assert c.coverage == '3 of 4 clips'
    pairs = write(tmp_path/'right.csv', 'caption,file_name\nWind,Door.wav\nA door,Wind.wav\nWind, Rain.wav\n')
    assert read_relevance(pairs, c) == [{0}, {0}, {1}, {1}, {2, 1}, {2}]
    kept = c.only([x.id for x in c.clips[1:]])
    assert read_relevance(pairs, kept) == [{0}, {0}, {1, 0}, {1}]


def test_bad_right_pairs(tmp_path):
    c = clotho(tmp_path)
    message = lambda text, name='right.csv': error_of(read_relevance, write(tmp_path/name, text), c)
    assert "right.csv row 3: clotho has no clip 'Sea.wav'" in message('caption,file_name\nWind,Door.wav\nWind,Sea.wav\n')
    assert "right.csv row 2: clotho has no caption 'the sea'" in message('caption,file_name\nThe sea,Door.wav\n')
    assert 'right.csv row 2: caption is empty' in message('caption,file_name\n,Door.wav\n')
    assert 'right.csv row 1: no column file_name or path or clip' in message('caption,sound\nWind,Door.wav\n')
    assert 'right.csv row 1: no column caption or query' in message('words,file_name\nWind,Door.wav\n')
    assert 'row 2: audio_filenames is' in message('query,audio_filenames\nWind,__import__("os").system("touch hacked")\n'.replace('"', "'"))
    assert "right.json caption 'Wind': clotho has no clip 'Sea'" in message('{"Wind": ["Door", "Sea"]}', 'right.json')
    assert "right.json caption 'Wind': clip 7 is not text" in message('{"Wind": [7]}', 'right.json')
    assert 'no such file of relevant clips' in error_of(read_relevance, tmp_path/'no.csv', c)
    both = Corpus('x', [Clip(f'{s}/Door', s, ('door',), ('Door',), f'recipe {s}') for s in ('train', 'test')], None, 1)
    assert "'Door.wav' may be any of 2 clips" in error_of(read_relevance, write(tmp_path/'r.csv', 'caption,clip\nDoor,Door.wav\n'), both)
    assert read_relevance(write(tmp_path/'r.csv', 'caption,clip\nDoor,train/Door\n'), both) == [{0}, {1, 0}]


# --- the real tables are read as fast as before

def test_loading_audiocaps_stays_fast():
    folder = os.environ.get('CMLF_AUDIOCAPS_CSV')
    if not folder: pytest.skip('CMLF_AUDIOCAPS_CSV is not set: the csv files of AudioCaps are not here')
    times = []
    for _ in range(3):
        start = time.process_time()
        c = load_corpus(folder, 10, audio=False)
        times.append(time.process_time() - start)
    start = time.process_time()
    first = c.hash
    again = [c.hash for _ in range(100)]
    assert min(times) < 5 and time.process_time() - start < 2 and set(again) == {first}  # measured: 0.9 and 0.2
    assert recognise(folder)[0].name == 'csv_files' and pool_hash(c.split('test')) == 'a61e7c05d4c8'
