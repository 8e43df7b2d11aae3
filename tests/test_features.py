"Audio files of many formats, damaged files, and stores: interrupted builds, two builds at once."
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import types

import librosa
import numpy as np
import pytest
import soundfile as sf
import torch

from cmlf import features
from cmlf.core import CmlfError, content_hash, read_json
from cmlf.features import HOP, N_FFT, SAMPLE_RATE, FeatureStore, LogMel, build_store, fit, load_audio, probe_audio


def tone(rate, seconds=1.0, f0=1000):
    t = np.arange(round(rate * seconds)) / rate
    return .5 * np.sin(2 * np.pi * f0 * t)


FORMATS = [('wav', 'PCM_U8', 1e-2), ('wav', 'PCM_16', 1e-3), ('wav', 'PCM_24', 1e-3), ('wav', 'PCM_32', 1e-3),
           ('wav', 'FLOAT', 1e-3), ('wav', 'DOUBLE', 1e-3), ('flac', 'PCM_16', 1e-3), ('flac', 'PCM_24', 1e-3),
           ('aiff', 'PCM_16', 1e-3), ('ogg', 'VORBIS', 5e-2), ('mp3', 'MPEG_LAYER_III', 5e-2)]


@pytest.mark.parametrize('ext,subtype,atol', FORMATS)
def test_formats(tmp_path, ext, subtype, atol):
    path = tmp_path / f'tone.{ext}'
    sf.write(path, tone(SAMPLE_RATE), SAMPLE_RATE, subtype=subtype)
    wave = load_audio(path)
    assert wave.dtype == np.float32 and wave.ndim == 1 and np.abs(wave).max() <= 1
    middle = slice(SAMPLE_RATE // 4, SAMPLE_RATE // 2)
    if ext == 'mp3':  # its decoder may shift the sound: compare loudness only
        assert abs(wave[middle].std() - .5 / np.sqrt(2)) < atol
    else:
        assert np.abs(wave - tone(SAMPLE_RATE))[middle].max() < atol


@pytest.mark.parametrize('rate', [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize('channels', [1, 2, 6])
def test_rates_and_channels(tmp_path, rate, channels):
    path = tmp_path / 'tone.wav'
    sf.write(path, np.repeat(tone(rate)[:, None], channels, 1), rate)
    wave = load_audio(path)
    assert wave.shape == (SAMPLE_RATE,)
    assert np.abs(wave - tone(SAMPLE_RATE))[1000:-1000].max() < 2e-3


def test_channels_are_averaged(tmp_path):
    sf.write(tmp_path / 'a.wav', np.stack([tone(SAMPLE_RATE), 0 * tone(SAMPLE_RATE)], 1), SAMPLE_RATE)
    assert np.allclose(load_audio(tmp_path / 'a.wav'), tone(SAMPLE_RATE) / 2, atol=1e-4)


def test_beyond_full_scale_is_scaled(tmp_path):
    sf.write(tmp_path / 'hot.wav', 6 * tone(SAMPLE_RATE), SAMPLE_RATE, subtype='FLOAT')
    assert np.allclose(load_audio(tmp_path / 'hot.wav'), 2 * tone(SAMPLE_RATE), atol=1e-3)


@pytest.mark.parametrize('rate', [16000, 44100])
def test_seconds_cuts_and_pads(tmp_path, rate):
    sf.write(tmp_path / 'a.flac', tone(rate, 3), rate)
    whole = load_audio(tmp_path / 'a.flac')
    assert np.allclose(load_audio(tmp_path / 'a.flac', 1.5), fit(whole, 1.5), atol=1e-5)
    longer = load_audio(str(tmp_path / 'a.flac'), 4)
    assert longer.shape == (4 * SAMPLE_RATE,) and not longer[len(whole):].any()


def bad_files(folder):
    (folder / 'text.wav').write_text('no sound at all')
    (folder / 'zero-bytes.wav').touch()
    (folder / 'folder.wav').mkdir()
    (folder / 'raw.raw').write_bytes(bytes(1000))
    sf.write(folder / 'empty.wav', np.zeros(0), SAMPLE_RATE)
    sf.write(folder / 'empty.flac', np.zeros(0), 44100)
    sf.write(folder / 'short.wav', np.zeros(N_FFT - 1), SAMPLE_RATE)
    sf.write(folder / 'short-8k.wav', np.zeros(200), 8000)
    sf.write(folder / 'nan.wav', np.array([0, np.nan] * 4000), SAMPLE_RATE, subtype='FLOAT')
    sf.write(folder / 'inf.wav', np.array([0, np.inf] * 4000), SAMPLE_RATE, subtype='FLOAT')
    return ['missing.wav', *sorted(p.name for p in folder.iterdir())]


def test_bad_files_are_named_in_one_line(tmp_path):
    for name in bad_files(tmp_path):
        for seconds in (None, 2.0):
            with pytest.raises(CmlfError) as e:
                load_audio(tmp_path / name, seconds)
            assert name in str(e.value) and '\n' not in str(e.value)


def test_one_window_is_enough(tmp_path):
    sf.write(tmp_path / 'a.wav', np.zeros(N_FFT), SAMPLE_RATE)
    assert load_audio(tmp_path / 'a.wav').shape == (N_FFT,)


def test_a_truncated_file_gives_its_rest_or_an_error(tmp_path):
    for ext in ('wav', 'flac', 'ogg'):
        sf.write(tmp_path / f'a.{ext}', np.random.default_rng(0).uniform(-.5, .5, SAMPLE_RATE), SAMPLE_RATE)
        data = (tmp_path / f'a.{ext}').read_bytes()
        (tmp_path / f'cut.{ext}').write_bytes(data[:len(data) // 2])
        try:
            assert np.isfinite(load_audio(tmp_path / f'cut.{ext}')).all()
        except CmlfError as e:
            assert f'cut.{ext}' in str(e)


# ---- valid files give the same as one plain read; codecs that cannot seek, damaged files, channels that cancel

def plain_read(path, seconds):
    "The reference: one read without checks, channels averaged."
    with sf.SoundFile(str(path)) as f:
        wave, rate = f.read(-1 if seconds is None else int(np.ceil((seconds + .5) * f.samplerate)),
                            dtype='float32', always_2d=True), f.samplerate
    wave = librosa.resample(wave.mean(1), orig_sr=rate, target_sr=SAMPLE_RATE, res_type='soxr_hq')
    wave = (wave / max(1, np.abs(wave).max())).astype(np.float32)
    return wave if seconds is None else fit(wave, seconds)


def noise(samples, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-.4, .4, (samples, channels))


@pytest.mark.parametrize('ext,subtype,atol', [*FORMATS, ('ogg', 'OPUS', 0), ('au', 'ULAW', 0), ('caf', 'ALAC_16', 0)])
@pytest.mark.parametrize('channels', [1, 2])
@pytest.mark.parametrize('seconds', [None, 1.5, 4])
def test_valid_files_equal_one_plain_read(tmp_path, monkeypatch, ext, subtype, atol, channels, seconds):
    path = tmp_path / f'a.{ext}'
    sf.write(path, noise(100000, channels), 48000, subtype=subtype)
    assert np.array_equal(load_audio(path, seconds), plain_read(path, seconds))
    assert probe_audio(path, seconds) == dict(seconds=100000 / 48000, rate=48000, error='', remark='')
    monkeypatch.setattr(features, '_BLOCK', 9999)  # many blocks
    assert np.array_equal(load_audio(path, seconds), plain_read(path, seconds))


CANNOT_SEEK = [('wav', 'GSM610', 8000), ('aiff', 'GSM610', 8000), ('w64', 'GSM610', 8000), ('wav', 'G721_32', 8000),
               ('wav', 'NMS_ADPCM_16', 8000), ('au', 'G721_32', 8000), ('au', 'G723_24', 8000), ('au', 'G723_40', 8000)]


@pytest.mark.parametrize('ext,subtype,rate', CANNOT_SEEK)
@pytest.mark.parametrize('seconds', [None, 1, 5])
def test_codecs_that_cannot_seek(tmp_path, ext, subtype, rate, seconds):
    path = tmp_path / f'a.{ext}'
    sf.write(path, tone(rate, 3, 500), rate, subtype=subtype)
    assert not sf.SoundFile(str(path)).seekable()
    wave, seen = load_audio(path, seconds), probe_audio(path, seconds)
    assert seen['error'] == '' and abs(seen['seconds'] - 3) < .1
    assert seconds is None or len(wave) == seconds * SAMPLE_RATE
    assert abs(wave[8000:24000].std() - .5 / np.sqrt(2)) < .06


def broken_files(folder):
    "Nine files with a length of three seconds in the header, but less sound."
    for ext, kw in dict(wav={}, flac={}, aiff={}, au={}, w64={}, mp3={}, ogg={}, opus=dict(format='OGG', subtype='OPUS')).items():
        sf.write(folder / f'whole.{ext}', noise(48000 * 3, 2), 48000, **kw)
        data = bytearray((folder / f'whole.{ext}').read_bytes())
        if ext not in ('ogg', 'opus'):  # an Ogg stream that ends early is a valid shorter one
            (folder / f'cut.{ext}').write_bytes(data[:len(data) // 2])
        if ext in ('flac', 'opus', 'mp3'):
            middle = len(data) // 2
            data[middle:middle + 4000] = bytes(4000)
            (folder / f'hole.{ext}').write_bytes(data)
    return sorted(p for p in folder.iterdir() if p.stem != 'whole')


def test_broken_files_are_named_by_reader_and_probe(tmp_path, capfd):
    broken = broken_files(tmp_path)
    assert len(broken) == 9
    for path in broken:
        for seconds in (None, 2.5):
            with pytest.raises(CmlfError, match=f'{path.name}: cut off') as e: load_audio(path, seconds)
            assert '\n' not in str(e.value) and probe_audio(path, seconds)['error'] in str(e.value)
        assert not probe_audio(path, .1)['error'] and len(load_audio(path, .1)) == 3200  # the used part is complete


def test_the_end_of_a_long_file_is_not_used_but_remarked(tmp_path):
    sf.write(tmp_path / 'a.flac', noise(SAMPLE_RATE * 9), SAMPLE_RATE)
    data = (tmp_path / 'a.flac').read_bytes()
    (tmp_path / 'a.flac').write_bytes(data[:len(data) * 2 // 3])
    assert probe_audio(tmp_path / 'a.flac', 2) == dict(seconds=9, rate=SAMPLE_RATE, error='', remark='cut off after the used part')
    assert probe_audio(tmp_path / 'a.flac', 9)['error']


def test_the_length_of_a_wav_from_a_pipe_is_ignored(tmp_path):
    sf.write(tmp_path / 'a.wav', noise(SAMPLE_RATE), SAMPLE_RATE)
    data = bytearray((tmp_path / 'a.wav').read_bytes())
    for size in (0xffffffff, 0x7ffff000, 0x7fffffff):
        data[40:44] = size.to_bytes(4, 'little')
        (tmp_path / 'a.wav').write_bytes(data)
        assert probe_audio(tmp_path / 'a.wav')['error'] == '' and len(load_audio(tmp_path / 'a.wav')) == SAMPLE_RATE
    data[40:44] = (2 * SAMPLE_RATE + 6).to_bytes(4, 'little')  # miscounted by a few bytes
    (tmp_path / 'a.wav').write_bytes(data)
    assert probe_audio(tmp_path / 'a.wav')['error'] == ''


def test_a_flac_without_length_is_refused(tmp_path):
    sf.write(tmp_path / 'a.flac', noise(SAMPLE_RATE), SAMPLE_RATE)
    data = bytearray((tmp_path / 'a.flac').read_bytes())
    data[21] &= 0xf0; data[22:26] = bytes(4)  # the 36 bits of the number of samples
    (tmp_path / 'a.flac').write_bytes(data)
    assert 'has no length' in probe_audio(tmp_path / 'a.flac', 1)['error']
    with pytest.raises(CmlfError, match='a.flac: its header has no length'): load_audio(tmp_path / 'a.flac', .1)


@pytest.mark.parametrize('ext,subtype', [('wav', 'PCM_16'), ('flac', 'PCM_24'), ('mp3', 'MPEG_LAYER_III')])
@pytest.mark.parametrize('seconds', [None, 1])
def test_cancelling_channels_give_the_loudest_one(tmp_path, ext, subtype, seconds):
    x = tone(SAMPLE_RATE, 2)
    sf.write(tmp_path / f'a.{ext}', np.stack([x, -x], 1), SAMPLE_RATE, subtype=subtype)
    wave = load_audio(tmp_path / f'a.{ext}', seconds)
    assert abs(np.abs(wave[2000:-2000]).max() - .5) < .06
    assert probe_audio(tmp_path / f'a.{ext}', seconds)['remark'] == 'channels cancel, took the loudest'
    sf.write(tmp_path / 'b.wav', np.stack([.97 * x, -x], 1), SAMPLE_RATE)  # the louder of the two
    assert np.allclose(load_audio(tmp_path / 'b.wav', 1), -x[:SAMPLE_RATE], atol=1e-4)


@pytest.mark.parametrize('channels', [
    lambda x, y: [x, 0 * x], lambda x, y: [x, y], lambda x, y: [x, .5 * y - .8 * x], lambda x, y: [0 * x, 0 * x],
    lambda x, y: [x] + 15 * [0 * x], lambda x, y: [x, x]])
def test_channels_that_do_not_cancel_are_averaged(tmp_path, channels):
    x, y = noise(SAMPLE_RATE, 2).T / 2
    sf.write(tmp_path / 'a.wav', np.stack(channels(x, y), 1), SAMPLE_RATE)
    assert np.array_equal(load_audio(tmp_path / 'a.wav'), plain_read(tmp_path / 'a.wav', None))
    assert 'cancel' not in probe_audio(tmp_path / 'a.wav')['remark']


def test_silence_and_clipping_are_remarked(tmp_path):
    def remark(wave):
        sf.write(tmp_path / 'a.wav', wave, SAMPLE_RATE)
        return probe_audio(tmp_path / 'a.wav')['remark']
    assert remark(np.zeros(9000)) == remark(1e-5 * noise(9000)) == 'silent' and remark(.01 * noise(9000)) == ''
    for f0 in (50, 441, 5003): assert remark(2 * tone(SAMPLE_RATE, f0=f0)) == ''  # full scale, and no clipping
    assert remark(np.clip(2.4 * tone(SAMPLE_RATE), -1, 1)).startswith('clipped, ')
    sf.write(tmp_path / 'a.wav', 6 * tone(SAMPLE_RATE), SAMPLE_RATE, subtype='FLOAT')  # scaled, not clipped
    assert probe_audio(tmp_path / 'a.wav')['remark'] == ''


def test_the_probe_refuses_what_the_reader_refuses(tmp_path):
    for name in bad_files(tmp_path):
        if name.split('.')[0] in ('empty', 'short', 'short-8k'): continue  # the reader refuses them for their length
        assert probe_audio(tmp_path / name, 2)['error'], name


def test_the_probe_needs_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(features, '_BLOCK', 4096)
    sf.write(tmp_path / 'a.wav', noise(SAMPLE_RATE * 60, 2), SAMPLE_RATE)
    tracemalloc.start()
    assert probe_audio(tmp_path / 'a.wav')['seconds'] == 60
    assert tracemalloc.get_traced_memory()[1] < 2e6  # the sound would be 15 MB
    tracemalloc.stop()


@pytest.mark.parametrize('hop', [160, HOP, 640])
@pytest.mark.parametrize('samples', [1025, 32000, 50001])
def test_frames_and_parity(hop, samples):
    x = np.random.default_rng(samples).uniform(-1, 1, (2, samples)).astype(np.float32)
    front = LogMel(hop=hop)
    F = front(x)
    assert F.shape == (2, front.frames(samples), 64) and F.dtype == torch.float32
    for row, wave in zip(F, x):
        S = librosa.feature.melspectrogram(y=wave.astype(np.float64), sr=SAMPLE_RATE, n_fft=1024, hop_length=hop,
                                           n_mels=64, fmin=50, fmax=14000, power=2.0, pad_mode='reflect')
        assert np.abs(row.numpy() - librosa.power_to_db(S, top_db=None).T).max() < 1e-3


def test_log_mel_is_differentiable_and_batch_independent():
    x = torch.rand(3, 4000, requires_grad=True)
    F = LogMel()(x)
    F.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.allclose(F[1:2], LogMel()(x[1:2]), atol=1e-5)


def test_a_waveform_with_gradient_gives_the_same_values():
    x, front = torch.rand(3, 4000) * 2 - 1, LogMel()
    with_gradient = front(x.clone().requires_grad_())
    assert with_gradient.requires_grad and not front(x).requires_grad
    assert (with_gradient - front(x)).abs().max() < 1e-4
    with torch.no_grad(): assert torch.equal(front(x.clone().requires_grad_()), front(x))


@pytest.mark.parametrize('samples', [513, 1025, 5000, 50001, 163840, 320000])
@pytest.mark.parametrize('hop', [HOP, 640])
def test_same_bits_in_any_batch_and_at_any_place(samples, hop):
    x = torch.from_numpy(np.random.default_rng(samples).uniform(-1, 1, (5, samples)).astype(np.float32))
    front, threads = LogMel(hop=hop), torch.get_num_threads()
    alone = torch.cat([front(row[None]) for row in x])
    assert torch.equal(front(x), alone) and torch.equal(front(x.flip(0)), alone.flip(0))
    assert torch.equal(front(torch.cat([x, x[:1]])), torch.cat([alone, alone[:1]]))
    wide = torch.zeros(5, samples + 3)
    wide[:, 1:-2] = x  # rows at other addresses, with gaps between them
    assert torch.equal(front(wide[:, 1:-2]), alone) and torch.equal(front(x.numpy()), alone)
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert (front(x) - alone).abs().max() < 1e-5
    finally: torch.set_num_threads(threads)


def signals():
    r, t = np.random.default_rng(0), np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    sine = lambda f: .9 * np.sin(2 * np.pi * f * t)
    noise = r.standard_normal(len(t))
    return dict(noise=.2 * noise, tone=sine(5003), low=sine(60), square=np.sign(sine(441)), impulse=1. * (t == 1), silence=0 * t,
                chirp=.9 * np.sin(2 * np.pi * (50 * t + 3475 * t**2)), near_silence=1e-6 * noise, offset=.9 + 0 * t, step=np.sign(t - 1),
                loud_and_quiet=sine(1000) + 1e-5 * noise, loud_then_quiet=np.where(t < 1, sine(1000), 1e-4 * noise),
                two_tones=sine(1000) + 1e-3 * sine(7000), fading=sine(3000) * 10**(-3 * t), last_bits=np.round(2 * sine(500)) / 32768)


@pytest.mark.parametrize('name', signals())
def test_parity_in_double_precision(name):
    "All bins within 60 dB of the peak to 1e-3 dB, in a batch; other bins to 0.5 dB."
    x = signals()[name].astype(np.float32)
    for hop in (HOP, 640):
        S = librosa.feature.melspectrogram(y=x.astype(np.float64), sr=SAMPLE_RATE, n_fft=1024, hop_length=hop, n_mels=64, fmin=50,
                                           fmax=14000, power=2.0, pad_mode='reflect', dtype=np.float64)
        theirs = librosa.power_to_db(S, amin=1e-10, top_db=None).T
        d = np.abs(LogMel(hop=hop)(np.stack([x, x[::-1]]))[0].numpy() - theirs)
        assert d[theirs > theirs.max() - 60].max() < 1e-3 and d.max() < .5


@pytest.mark.parametrize('settings', [dict(n_mels=65), dict(n_mels=1), dict(n_mels=30, n_fft=512, hop=100), dict(fmin=0, fmax=16000), dict(n_fft=2048, n_mels=128)])
def test_parity_of_other_settings(settings):
    x = np.random.default_rng(0).uniform(-1, 1, 20000).astype(np.float32)
    kw = dict(n_fft=1024, n_mels=64, fmin=50, fmax=14000) | {k: v for k, v in settings.items() if k != 'hop'}
    S = librosa.feature.melspectrogram(y=x.astype(np.float64), sr=SAMPLE_RATE, hop_length=settings.get('hop', HOP), pad_mode='reflect', dtype=np.float64, **kw)
    assert np.abs(LogMel(**settings)(x[None])[0].numpy() - librosa.power_to_db(S, amin=1e-10, top_db=None).T).max() < 1e-3


def test_odd_windows_are_refused():
    with pytest.raises(CmlfError, match='n_fft=1023 should be an even'): LogMel(n_fft=1023)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu_agrees():
    x = torch.rand(4, 64000) * 2 - 1
    assert (LogMel().cuda()(x).cpu() - LogMel()(x)).abs().max() < 1e-3


# ---- the store

def make(i):
    return np.random.default_rng(i).uniform(-1, 1, 16000).astype(np.float32)


def build(folder, n, read=make, **kw):
    return build_store(folder, [f'clip {i}' for i in range(n)], read, LogMel(), .5, **kw)


def slow(i):
    time.sleep(.05)
    return make(i)


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from test_features import build, slow
build({folder!r}, 60, slow)
"""


def test_kill_and_resume(tmp_path):
    script = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, '-c', script], stderr=subprocess.DEVNULL)
    for _ in range(1200):
        counter = next(tmp_path.glob('*.done'), None)
        if counter and read_json(counter) >= 6: break
        assert child.poll() is None, 'the child process ended before it could be killed'
        time.sleep(.05)
    child.send_signal(signal.SIGKILL); child.wait()
    assert not list(tmp_path.glob('*.npy'))
    done, part = read_json(counter), counter.with_suffix('.part')
    rows = np.lib.format.open_memmap(part, 'r+')
    assert rows.shape == (60, 51, 64)
    rows[done, :7] = 5  # half a row
    del rows
    seen = []
    store = build(tmp_path, 60, lambda i: seen.append(i) or make(i))
    assert 6 <= done < 60 and sorted(seen) == list(range(done, 60))
    whole = build(tmp_path / 'whole', 60)
    assert store.path.read_bytes() == whole.path.read_bytes() and store.path.name == whole.path.name
    assert not list(tmp_path.glob('*.part')) and not list(tmp_path.glob('*.done'))


def test_a_store_equals_a_saved_array(tmp_path):
    store = build(tmp_path, 3)
    np.save(tmp_path / 'saved.npy', np.stack([LogMel()(make(i)[None])[0].half().numpy() for i in range(3)]))
    assert store.path.read_bytes() == (tmp_path / 'saved.npy').read_bytes()


def test_interrupted_and_resumed(tmp_path):
    def stop(i):
        if i == 30: raise KeyboardInterrupt
        return make(i)
    with pytest.raises(KeyboardInterrupt): build(tmp_path, 40, stop)
    seen = []
    store = build(tmp_path, 40, lambda i: seen.append(i) or make(i))
    # clips are read up to four per thread ahead of the rows
    assert sorted(seen) == list(range(min(seen), 40)) and 30 - 4 * torch.get_num_threads() - 1 <= min(seen) <= 30
    assert store.path.read_bytes() == build(tmp_path / 'whole', 40).path.read_bytes()


def test_incomplete_files_of_other_builds_are_ignored(tmp_path):
    "A part file without a count, as versions before wrote it, and a count without a part file."
    whole = build(tmp_path / 'whole', 4)
    data = whole.path.read_bytes()
    for left in ('part', 'done'):
        folder = tmp_path / left
        folder.mkdir()
        if left == 'part': (folder / whole.path.with_suffix('.part').name).write_bytes(data[:128] + bytes(51 * 64 * 2 + 10))
        else: (folder / whole.path.with_suffix('.done').name).write_text('3')
        assert build(folder, 4).path.read_bytes() == data
        assert sorted(p.suffix for p in folder.iterdir()) in (['.npy'], ['.lock', '.npy'])


def build_and_count(folder, results):
    seen = []
    store = build(folder, 20, lambda i: seen.append(i) or slow(i), workers=2)
    results.put((len(seen), content_hash(np.array(store.rows))))


def test_two_processes_share_one_build(tmp_path):
    spawn = mp.get_context('spawn')
    results = spawn.Queue()
    both = [spawn.Process(target=build_and_count, args=(tmp_path, results)) for _ in range(2)]
    for p in both: p.start()
    found = [results.get(timeout=120) for _ in both]
    for p in both: p.join()
    assert sorted(n for n, _ in found) == [0, 20] and found[0][1] == found[1][1]
    assert len(list(tmp_path.glob('*.npy'))) == 1


def test_threads_do_not_matter(tmp_path):
    threads = torch.get_num_threads()
    stores = [build(tmp_path / f'{w}', 9, workers=w) for w in (0, 1, 3)]
    assert torch.get_num_threads() == threads
    for other in stores[1:]:
        assert np.array_equal(stores[0].rows, other.rows)


def test_key_follows_content_settings_and_length(tmp_path):
    read = make
    paths = [build_store(tmp_path, keys, read, front, seconds).path for keys, front, seconds in
             ((['a', 'b'], LogMel(), .5), (['b', 'a'], LogMel(), .5), (['a', 'c'], LogMel(), .5),
              (['a', 'b'], LogMel(fmin=20), .5), (['a', 'b'], LogMel(), .6))]
    assert len(set(paths)) == 5
    assert build_store(tmp_path, ['a', 'b'], read, LogMel(hop=320), .5).path == paths[0]


def test_reading_by_index(tmp_path):
    import pickle
    store = build(tmp_path, 8)
    assert isinstance(store.rows, np.memmap) and not store.rows.flags.writeable
    for indices in ([5, 1], np.array([5, 1]), torch.tensor([5, 1])):
        assert store[indices].dtype == torch.float32 and torch.equal(store[indices][1], store[1])
    assert store[2:4].shape == (2, 51, 64) and len(list(store)) == 8
    with pytest.raises(IndexError): store[[8]]
    pickled = pickle.dumps(store)
    assert len(pickled) < 500 and torch.equal(pickle.loads(pickled)[[3]], store[[3]])


def test_values_are_within_004_db(tmp_path):
    front = LogMel()
    loud = [np.sign(np.sin(np.arange(16000) / k)).astype(np.float32) for k in (3, 30, 300)]
    store = build_store(tmp_path, ['x', 'y', 'z'], loud.__getitem__, front, .5)
    assert (store[[0, 1, 2]] - front(np.stack(loud))).abs().max() < .04


def test_bad_clip_is_named_and_the_rest_kept(tmp_path):
    for bad in (np.array([np.nan] * 9), np.zeros((2, 9)), np.zeros(0)):
        with pytest.raises(CmlfError, match='clip 5'):
            build(tmp_path, 9, lambda i: bad if i == 5 else make(i), workers=2)
    assert len(build(tmp_path, 9)) == 9
    with pytest.raises(CmlfError, match='no clips'): build(tmp_path, 0)


def test_damaged_store_is_named(tmp_path):
    store = build(tmp_path, 4)
    path, data = store.path, store.path.read_bytes()
    del store
    path.write_bytes(data[:-100])
    with pytest.raises(CmlfError, match=path.name): FeatureStore(path)


def test_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda p: types.SimpleNamespace(free=1000))
    with pytest.raises(CmlfError, match='GB'): build(tmp_path, 4)
