"""Compare log-mel extraction with librosa and torchlibrosa; find the limit; extract whole corpora.

    python benchmarks/features.py --events /path/to/ESC-10

Clips of 10 s at 32 kHz, window 1024, hop 320, 64 bands. Each number of threads is measured in a new
process; with one thread, time is processor time. The methods take turns, so that other work on the
machine slows all of them alike, and the shortest of several times counts. Without recordings (--events or CMLF_ESC_DIR), only synthetic
sounds are measured. Writes features.md, .csv, .json and .png to reports/benchmarks; `--quick` is a
trial that writes to runs/features. It is an error if a value within 60 dB of the peak differs from
the reference in double precision by 0.001 dB or more.
"""
import argparse, math, os, sys, tempfile, time
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import soundfile as sf
import torch

from cmlf.config import get_profile
from cmlf.core import (CmlfError, Progress, atomic_path, commit, log, machine, rng, write_json,
                       write_text)
from cmlf.features import (AMIN, FMAX, FMIN, HOP, N_FFT, N_MELS, SAMPLE_RATE, LogMel, band_groups,
                           build_store, load_audio, mel_filters)
from cmlf.soundscapes import compose
from shared import answer, run_job, threads_of

ROOT = Path(__file__).resolve().parent.parent
SECONDS, BATCHES, THREADS = 10, (1, 8, 32), (1, 2)
SAMPLES, FRAMES = SECONDS * SAMPLE_RATE, SECONDS * SAMPLE_RATE // HOP + 1
MEL = dict(n_fft=N_FFT, n_mels=N_MELS, fmin=FMIN, fmax=FMAX)
LIMIT = 1e-3  # dB
OURS, BEFORE, LIBROSA, TORCHLIBROSA = 'cmlf', 'cmlf before', 'librosa', 'torchlibrosa'

# ---- methods: float32 waves (B, samples) -> log-mel (B, frames, bands)

def librosa_one(x, dtype=None):
    S = librosa.feature.melspectrogram(y=x, sr=SAMPLE_RATE, hop_length=HOP, pad_mode='reflect',
                                       **MEL, **(dict(dtype=dtype) if dtype else {}))
    return librosa.power_to_db(S, ref=1.0, amin=AMIN, top_db=None).T

def reference(x):
    "One clip in double precision."
    return librosa_one(x.astype(np.float64), np.float64)

def librosa_method():
    "Clip by clip, which is faster than a batch."
    return lambda waves: np.stack([librosa_one(x) for x in waves.numpy()])

def torchlibrosa_method():
    try: from torchlibrosa.stft import LogmelFilterBank, Spectrogram
    except ImportError: raise CmlfError('torchlibrosa is missing: make .venv/dev') from None
    power = Spectrogram(n_fft=N_FFT, hop_length=HOP, win_length=N_FFT, window='hann', center=True,
                        pad_mode='reflect', freeze_parameters=True)
    mel = LogmelFilterBank(sr=SAMPLE_RATE, ref=1.0, amin=AMIN, top_db=None, freeze_parameters=True,
                           **MEL)
    return lambda waves: mel(power(waves))[:, 0]

def before_method():
    "A whole batch at once, Fourier transform in double precision."
    window, M = torch.hann_window(N_FFT, dtype=torch.float64), mel_filters().float()
    def method(waves):
        X = torch.stft(waves.double(), N_FFT, HOP, window=window, center=True, pad_mode='reflect',
                       return_complex=True).transpose(1, 2)
        P = (X.real.square() + X.imag.square()).float()
        return 10 * (P @ M).clamp_min(AMIN).log10()
    return method

METHODS = {OURS: LogMel, BEFORE: before_method, LIBROSA: librosa_method,
           TORCHLIBROSA: torchlibrosa_method}

# ---- timing

def shortest(calls, rounds, clock=time.thread_time):
    "The shortest of `rounds` times of every call, in seconds; the calls take turns."
    best = dict.fromkeys(calls, math.inf)
    for f in calls.values(): f()
    for _ in range(rounds):
        for name, f in calls.items():
            for _ in range(2):  # the first one may find the cache full of another method's data
                began = clock()
                f()
                best[name] = min(best[name], clock() - began)
    return best

def noise(n, samples=SAMPLES):
    return torch.from_numpy(rng(0, 'waves').uniform(-1, 1, (n, samples)).astype(np.float32))

# ---- jobs: each runs in a new process and returns JSON values

@torch.inference_mode()
def transform(threads, quick, events):
    "ms per clip of every method and batch."
    methods, waves, rows = {k: make() for k, make in METHODS.items()}, noise(max(BATCHES)), []
    clock = time.thread_time if threads == 1 else time.perf_counter
    for batch in BATCHES:
        calls = {k: lambda f=f: f(waves[:batch]) for k, f in methods.items()}
        best = shortest(calls, 3 if quick else max(3, 30 // batch), clock)
        rows += [dict(method=k, threads=threads, batch=batch, ms=1000 * v / batch,
                      ratio=v / best[OURS]) for k, v in best.items()]
    return rows

def signals():
    "Sounds that show differences; see the page of `cmlf.features`."
    r, t = rng(0, 'signals'), np.arange(SAMPLES) / SAMPLE_RATE
    sine = lambda f: .9 * np.sin(2 * np.pi * f * t)
    n = r.standard_normal(SAMPLES)
    found = dict(noise=.2 * n, tone=sine(5003), low_tone=sine(60), square=np.sign(sine(441)),
                 chirp=.9 * np.sin(2 * np.pi * (50 * t + 697 * t**2)), impulse=1. * (t == 1),
                 silence=0 * t, near_silence=1e-6 * n, loud_and_quiet=sine(1000) + 1e-5 * n,
                 loud_then_quiet=np.where(t < 5, sine(1000), 1e-4 * n))
    return {k: x.astype(np.float32) for k, x in found.items()}

def recordings(events):
    paths = sorted(p for p in Path(events).rglob('*') if p.suffix in ('.ogg', '.wav', '.flac'))
    if not paths: raise CmlfError(f'{events}: no recordings (.ogg, .wav, .flac)')
    return paths

@torch.inference_mode()
def parity(threads, quick, events):
    "Largest difference in dB from the reference, within 60 dB of the peak and elsewhere."
    methods, rows = {k: make() for k, make in METHODS.items()}, []
    sounds = list(signals().items())
    if events: sounds += [('recordings', p) for p in recordings(events)[::20 if quick else 1]]
    with Progress(len(sounds), 'sounds compared') as bar:
        for name, x in sounds:
            x = load_audio(x, 5) if name == 'recordings' else x
            theirs = reference(x)
            near = theirs > theirs.max() - 60
            for k, f in methods.items():
                d = np.abs(np.asarray(f(torch.from_numpy(x)[None])[0]) - theirs)
                rows.append(dict(sound=name, method=k, near=float(d[near].max()),
                                 other=float(d[~near].max(initial=0))))
            bar.step()
    return pd.DataFrame(rows).groupby(['sound', 'method'], sort=False).max().reset_index().to_dict(
        'records')

def alone(**calls):
    "The shortest time of every call in seconds, one call after the other."
    return {k: shortest({k: f}, 30)[k] for k, f in calls.items()}

def rates():
    "Rates of one thread: GFLOP/s of a matrix product, GB/s in the cache and in main memory."
    a, small, large = (torch.rand(s) for s in ((1024, 1024), (64, 1024), (32, 2**20)))
    one, two = torch.empty_like(small), torch.empty_like(large)
    best = alone(flop=lambda: a @ a, memory=lambda: torch.mul(large, large, out=two),
                 cache=lambda: [torch.mul(small, small, out=one) for _ in range(100)])
    return dict(gflops=2e-9 * 1024**3 / best['flop'], memory=8e-9 * large.numel() / best['memory'],
                cache=8e-7 * small.numel() / best['cache'])

@torch.inference_mode()
def limit(threads, quick, events):
    "Each step of one clip: operations, bytes, time, and the floor from the machine's rates."
    rate, groups, n = rates(), band_groups(mel_filters().float()), math.ceil(FRAMES / 2)
    wave, x, window, front = noise(1), torch.rand(n, N_FFT), torch.hann_window(N_FFT), LogMel()
    frames = wave[0].as_strided((n, N_FFT), (HOP, 1))
    both = torch.view_as_real(torch.fft.rfft(x)).flatten(1)
    squares, mel, out = both.square(), torch.rand(N_MELS, n), torch.empty(n, N_MELS)
    bands = [(w, squares.T[parts], mel[b]) for b, parts, w in groups]
    power, ln = torch.rand(N_MELS, n), torch.empty(N_MELS, n)
    best = alone(window=lambda: torch.mul(frames, window, out=x),
                 fourier=lambda: torch.fft.rfft(x),
                 squares=lambda: torch.mul(both, both, out=squares),
                 mel=lambda: [torch.mm(w, s, out=b) for w, s, b in bands],
                 decibels=lambda: torch.mul(torch.log(power, out=ln).T, 4.3, out=out),
                 whole=lambda: front(wave))
    F, bins, nonzero = FRAMES, N_FFT // 2 + 1, int((mel_filters() > 0).sum())
    count = dict(window=(F * N_FFT, 4 * (SAMPLES + F * N_FFT)),
                 fourier=(2.5 * F * N_FFT * math.log2(N_FFT), 4 * F * (N_FFT + 2 * bins)),
                 squares=(3 * F * bins, 16 * F * bins),
                 mel=(2 * F * nonzero, 4 * F * (2 * bins + N_MELS)),
                 decibels=(20 * F * N_MELS, 8 * F * N_MELS))
    rows = []
    for step, (flop, size) in count.items():
        floor = max(flop / rate['gflops'], size / rate['cache']) / 1e6
        ms = 1000 * best[step] * F / n
        rows.append(dict(step=step, mflop=flop / 1e6, mbytes=size / 1e6, ms=ms, floor_ms=floor,
                         ratio=ms / floor, gap_ms=ms - floor))
    rest = 1000 * best['whole'] - sum(r['ms'] for r in rows)
    return dict(rates=rate, steps=rows, whole_ms=1000 * best['whole'], rest_ms=rest)

def parts_of(corpus_parts, items):
    "Processor time in ms per clip of each part, one thread; a part gets the result of the last."
    total, first = dict.fromkeys(corpus_parts, 0.), items[0]
    for f in corpus_parts.values(): first = f(first)  # the first call imports and allocates
    for item in items:
        for name, f in corpus_parts.items():
            began = time.thread_time()
            item = f(item)
            total[name] += time.thread_time() - began
    return {k: 1000 * v / len(items) for k, v in total.items()}

def decode(path): return sf.read(path, dtype='float32', always_2d=True)

def resample(found):
    wave, rate = found
    return librosa.resample(wave[:, 0], orig_sr=rate, target_sr=SAMPLE_RATE, res_type='soxr_hq')

def extraction(name, n, read, parts, log_mel, seconds, threads, repeats):
    "Clips per second of `build_store` with this number of threads, and the parts of a clip."
    def build():
        with tempfile.TemporaryDirectory() as folder:
            build_store(folder, map(str, range(n)), read, log_mel, seconds, workers=threads)
    best = shortest({name: build}, repeats, time.perf_counter)[name]
    ideal = 1000 * threads / sum(parts.values())
    return dict(corpus=name, clips=n, threads=threads, clips_per_s=n / best,
                of_ideal=n / best / ideal, **{f'{k}_ms': v for k, v in parts.items()})

def corpora(threads, quick, events):
    "Whole corpora: synthesised scenes, and recordings if there are any."
    torch.set_num_threads(1)
    repeats, mini = 1 if quick else 3, get_profile('mini')
    corpus, scenes = compose(mini), 60 if quick else mini.corpus.n_train
    front = LogMel(hop=mini.audio.hop)
    last = {'log-mel': lambda x: front(torch.from_numpy(x)[None])}
    parts = parts_of(dict(synthesis=corpus.waveform) | last, range(scenes))
    rows = [extraction('scenes of mini', scenes, corpus.waveform, parts, front,
                       mini.audio.seconds, threads, repeats)]
    if not events: return rows
    paths, front = recordings(events)[:40 if quick else None], LogMel()
    parts = parts_of(dict(decoding=decode, resampling=resample) | last, paths)
    read = lambda i: load_audio(paths[i], 5)
    return [*rows, extraction('recordings of 5 s', len(paths), read, parts, front, 5, threads,
                              repeats)]

JOBS = {f.__name__: f for f in (transform, parity, limit, corpora)}

def job(name, threads, quick, events):
    "`JOBS[name]` in a new process with this number of threads."
    log(f'{name}, threads: {threads} ...')
    return run_job(__file__, name, dict(threads=threads, quick=quick, events=events), threads_of(threads))

# ---- report

def value(rows, **wanted): return next(r for r in rows if all(r[k] == v for k, v in wanted.items()))

def lowest(rows, method):
    row = min((r for r in rows if r['method'] == method), key=lambda r: r['ratio'])
    return f'{row["ratio"]:.1f} (threads {row["threads"]}, batch {row["batch"]})'

def wide(rows):
    "One line per method and number of threads: ms per clip and the ratio to ours, by batch."
    lines = []
    for method in METHODS:
        for threads in dict.fromkeys(r['threads'] for r in rows):
            cells = {}
            for b in BATCHES:
                r = value(rows, method=method, threads=threads, batch=b)
                cells[f'batch {b}'] = f'{r["ms"]:.2f} ms, {r["ratio"]:.1f}'
            lines.append(dict(method=method, threads=threads, **cells))
    return table(lines)

def table(rows, **formats):
    t = pd.DataFrame(rows)
    for c, form in formats.items():
        if c in t: t[c] = t[c].map(lambda v: '' if v is None or v != v else format(v, form))
    return t.to_markdown(index=False, disable_numparse=True)

def differences(rows):
    "Largest difference of every method, and ours by sound."
    t = pd.DataFrame(rows)
    most = t.groupby('method', sort=False)[['near', 'other']].max().reset_index()
    ours = t[t.method == OURS][['sound', 'near', 'other']]
    return table(most, near='.1e', other='.1e'), table(ours, near='.1e', other='.1e')

def limit_section(found):
    r, steps = found['rates'], found['steps']
    gap = max(steps, key=lambda s: s['gap_ms'])
    floor = sum(s['floor_ms'] for s in steps)
    return f"""## How far from the limit

One thread, one clip. Rates measured here: {r['gflops']:.0f} GFLOP/s in a matrix product of 1024 x
1024, {r['cache']:.0f} GB/s in the cache, {r['memory']:.0f} GB/s in main memory. The floor of a step
is the larger of its operations and its bytes, divided by these rates (of the cache, for the bytes).

{table(steps, mflop='.1f', mbytes='.1f', ms='.3f', floor_ms='.3f', ratio='.1f', gap_ms='.3f')}

The whole takes {found['whole_ms']:.2f} ms, the sum of the floors is {floor:.2f} ms:
{found['whole_ms'] / floor:.1f} times the floor. Padding and calls take {found['rest_ms']:.2f} ms.
The largest gap is in the step `{gap['step']}`: {gap['gap_ms']:.2f} ms, at
{gap['mflop'] / gap['ms']:.0f} GFLOP/s.
"""

def corpora_section(rows):
    return f"""## Whole corpora

`build_store` from sound to file. The parts are processor time per clip in one thread; `of_ideal` is
the rate divided by what the threads could do if every one of them computed parts all the time.

{table(rows, clips_per_s='.0f', of_ideal='.0%', synthesis_ms='.2f', decoding_ms='.2f',
       resampling_ms='.2f', **{'log-mel_ms': '.2f'})}
"""

def report(found):
    "The report as markdown."
    on, rows = found['machine'], found['transform']
    most, ours = differences(found['parity'])
    return f"""# Features

`python benchmarks/features.py --events ESC_FOLDER`: log-mel of clips of {SECONDS} s at 32 kHz, window
{N_FFT}, hop {HOP}, {N_MELS} bands. Measured on {on['device']}: {on['name']} with {on['cores']}
cores, {on['cpu']}; commit {found['commit']}.

- librosa takes at least {lowest(rows, LIBROSA)} times as long; the target is 4
- torchlibrosa takes at least {lowest(rows, TORCHLIBROSA)} times as long; the target is 12

{wide(rows)}

Each cell: time per clip, and this time divided by ours. `{BEFORE}` is a whole batch in double
precision.

![time per clip](features.png)

## Agreement

Largest difference in dB from librosa in double precision, in bins within 60 dB of the clip's peak
(`near`, the limit is {LIMIT}) and in all others.

{most}

Ours, by sound:

{ours}

{limit_section(found['limit'])}
{corpora_section(found['corpora'])}"""

def draw(found, path):
    "Time per clip of every method, and the steps of ours with their floors."
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    t = pd.DataFrame(found['transform'])
    t = t.pivot(index=['threads', 'batch'], columns='method', values='ms')[list(METHODS)]
    t.index = [f'batch {b}, threads {n}' for n, b in t.index]
    t.plot.barh(ax=left, width=.8)
    left.invert_yaxis()
    left.set(xscale='log', xlabel='ms per clip of 10 s', ylabel='', xlim=(.3, None))
    left.legend(fontsize=8, ncol=4, loc='lower center', bbox_to_anchor=(.5, 1))
    steps = pd.DataFrame(found['limit']['steps']).set_index('step')[['ms', 'floor_ms']]
    steps.columns = ['measured', 'floor']
    steps.plot.barh(ax=right, color=['C0', 'lightgray'])
    right.invert_yaxis(); right.set(xlabel='ms, one clip, one thread', ylabel='')
    with atomic_path(path) as tmp: fig.savefig(tmp, dpi=100)

def write(found, out):
    out.mkdir(parents=True, exist_ok=True)
    write_json(out/'features.json', found)
    write_text(out/'features.md', report(found))
    write_text(out/'features.csv', pd.DataFrame(found['transform']).round(4).to_csv(index=False))
    draw(found, out/'features.png')

def check(rows):
    "An error if ours is not as close to the reference as it must be."
    wrong = [r for r in rows if r['method'] == OURS and not r['near'] < LIMIT]
    if wrong: raise CmlfError('; '.join(f'{r["sound"]}: differs by {r["near"]:.1e} dB from '
                                        f'the reference, the limit is {LIMIT}' for r in wrong))

def arguments():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument('--events', default=os.environ.get('CMLF_ESC_DIR'),
                        help='folder of recordings (CMLF_ESC_DIR)')
    parser.add_argument('--quick', action='store_true', help='a trial: few and short measurements')
    parser.add_argument('--job', help=argparse.SUPPRESS)
    return parser.parse_args()

def main():
    args = arguments()
    if args.job: return answer(args.job, JOBS)
    cores = sorted({*THREADS, os.cpu_count()} if os.cpu_count() > 1 else {1})
    kw = dict(quick=args.quick, events=args.events)
    found = dict(machine=machine(), commit=commit(), parity=job('parity', 1, **kw))
    check(found['parity'])
    found['transform'] = [r for n in cores for r in job('transform', n, **kw)]
    found['limit'] = job('limit', 1, **kw)
    found['corpora'] = [r for n in cores for r in job('corpora', n, **kw)]
    out = ROOT/'runs'/'features' if args.quick else ROOT/'reports'/'benchmarks'
    write(found, out)
    log(f'{out/"features.md"} written')

if __name__ == '__main__':
    try: main()
    except CmlfError as e: log(f'features: {e}'); sys.exit(2)
