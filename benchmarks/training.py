"""What each step of a faster training loop buys, against a plain loop; and how far it is from the limits of the processor.

    python benchmarks/training.py

Two sizes: `paper` (width 64, 10 s, a BERT-base with random weights, 32 pairs) and `mini` (the profile). The plain loop is what
a first version looks like: log-mels are computed in every step, both encoders run in every step, captions are padded, and
everything is PyTorch's default in float32. From row to row one thing changes; the last row is `Trainer` itself. All rows see
the same batches. Before anything is timed, the losses of the plain loop and of `Trainer` are compared without dropout; if they
differ by more than 1e-4 in float32, or by 1e-6 in float64, the script ends with an error.

The captions are those of AudioCaps if `--captions` or CMLF_AUDIOCAPS_CSV gives its csv files, else of the synthesised corpus.
Writes training.md, .csv, .json and .png to reports/benchmarks. `--parts mini` repeats one part.
"""
import argparse, copy, os, sys, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import cmlf.encoders as encoders
from cmlf.appendix.dropout import Dropout, dropout as own_dropout
from cmlf.config import get_profile
from cmlf.core import CmlfError, commit, log, machine, one_of, precision, read_json, rng, seed_everything, write_json, write_text
from cmlf.encoders import DualEncoder
from cmlf.experiments import operations
from cmlf.features import LogMel, SAMPLE_RATE, build_store, mel_filters
from cmlf.loss import nt_xent
from cmlf.soundscapes import compose
from cmlf.training import PairedSplit, Stage, Tokens, Trainer
from shared import answer, random_bert, run_job

ROOT = Path(__file__).resolve().parent.parent
STAGES = Stage('random', 'audio', 1), Stage('random', 'text', 1), Stage('random', 'both', 1)
STEPS = ['plain loop', '+ stored log-mels', '+ cached frozen encoder', '+ packed captions', '+ channels last', '+ own dropout',
         '+ fused Adam', '+ bf16 where faster', 'cmlf (Trainer)']

# ---- the two sizes

def profile_of(size):
    if size == 'mini': return get_profile('mini')
    return get_profile('audiocaps', dict(text_model=random_bert(ROOT/'runs'/'benchmarks'/'random-bert-base')))

def new_model(p):
    "The model of a profile; the same weights at every call."
    seed_everything(0)
    return DualEncoder.from_profile(p)

def captions_of(folder, n):
    if not folder: return compose(get_profile('mini', dict(n_train=n))).split('train').captions[:n]
    return pd.read_csv(Path(folder)/'train.csv').caption.astype(str)[:n].tolist()

class Data:
    "n random clips with their captions, as waveforms and as a `PairedSplit`."
    def __init__(self, p, model, n, folder):
        r = rng(0, 'clips')
        self.waves = r.normal(0, .1, (n, int(p.audio.seconds * SAMPLE_RATE))).astype(np.float32)
        self.waves *= r.uniform(.1, 1, (n, 1)).astype(np.float32)
        self.hop = p.audio.hop
        self.folder = tempfile.TemporaryDirectory()
        store = build_store(self.folder.name, map(str, range(n)), lambda i: self.waves[i], LogMel(hop=p.audio.hop), p.audio.seconds)
        captions = captions_of(folder, n)
        self.pairs = PairedSplit(store, Tokens(model.text, captions), np.arange(n), np.arange(n))

# ---- the plain loop, and one change after the other

def plain_log_mel(wave, hop, window, mel):
    "The front end as PyTorch offers it, for a whole batch."
    X = torch.stft(wave, 1024, hop, window=window, return_complex=True).abs().square().transpose(1, 2)
    return 10 * (X @ mel).clamp_min(1e-10).log10()

def padded(text, tokens):
    "The text encoder as `transformers` has it."
    h = text.model(input_ids=tokens['input_ids'], attention_mask=tokens['attention_mask']).last_hidden_state
    if text.pool == 'cls': return h[:, 0]
    m = tokens['attention_mask'][:, :, None].float()
    return (h * m).sum(1) / m.sum(1)

def set_dropout(model, own):
    "Our dropout, or PyTorch's, in the whole model."
    encoders.dropout = own_dropout if own else lambda x, p, training=True: nn.functional.dropout(x, p, training)
    for m in list(model.modules()):
        for name, child in m.named_children():
            if isinstance(child, nn.Dropout): setattr(m, name, (Dropout if own else nn.Dropout)(child.p))

class Loop:
    "A training loop with the first `level` changes."
    def __init__(self, p, model, data, level, amp=True):
        self.p, self.model, self.data, self.level = p, model, data, level
        self.amp = amp and level >= 7
        self.window, self.mel = torch.hann_window(1024), mel_filters().float()
        model.to(memory_format=torch.channels_last if level >= 4 else torch.contiguous_format)
        set_dropout(model, level >= 5)

    def start(self, stage):
        self.stage = stage
        self.model.train_only(stage.trainable)
        frozen = dict(audio='text', text='audio', both='')[stage.trainable]
        self.cached = {}
        if frozen and self.level >= 2: self.cached[frozen] = self.cache(frozen)
        kw = dict(fused=True) if self.level >= 6 else dict()
        self.optimiser = torch.optim.Adam([q for q in self.model.parameters() if q.requires_grad], self.p.optimiser.lr, **kw)

    @torch.no_grad()
    def cache(self, side):
        rows = range(0, len(self.data.waves), 16)
        with torch.autocast('cpu', torch.bfloat16, enabled=self.amp):
            return torch.cat([self.encode(side, np.arange(i, min(i + 16, len(self.data.waves)))).float() for i in rows])

    def encode(self, side, clips):
        if side in self.cached: return self.cached[side][clips]
        with torch.set_grad_enabled(torch.is_grad_enabled() and side not in self.model.frozen):
            if side == 'text':
                tokens = self.data.pairs.tokens[clips]
                return self.model.text(tokens) if self.level >= 3 else padded(self.model.text, tokens)
            x = (self.data.pairs.store[clips] if self.level >= 1
                 else plain_log_mel(torch.from_numpy(self.data.waves[clips]), self.data.hop, self.window, self.mel))
            return self.model.audio(x)

    def step(self, clips):
        with torch.autocast('cpu', torch.bfloat16, enabled=self.amp):
            x = self.model.audio_head(self.encode('audio', clips))
            y = self.model.text_head(self.encode('text', clips))
        loss = nt_xent(x, y, self.p.optimiser.tau)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.p.optimiser.clip_norm:
            nn.utils.clip_grad_norm_([q for q in self.model.parameters() if q.grad is not None], self.p.optimiser.clip_norm)
        self.optimiser.step()
        return float(loss.detach())

class Ours:
    "The same interface to `Trainer`."
    def __init__(self, p, model, data, *_):
        set_dropout(model, True)
        model.to(memory_format=torch.channels_last)
        p = p.replace(schedule='constant', text_lr=p.optimiser.lr)
        self.trainer = Trainer(model, data.pairs, data.pairs, p, list(STAGES), log=lambda line: None)
        self.trainer.val = None # nothing is scored here

    def start(self, stage):
        self.trainer.stage = STAGES.index(stage)
        self.trainer.start_stage()

    def step(self, clips): return float(self.trainer.step(self.trainer.fetch((clips, clips)), 0.))

def loop(p, model, data, level): return (Ours if level == len(STEPS) - 1 else Loop)(p, model, data, level)

# ---- parts

def losses_of(p, level, folder, batch, steps, double=False):
    "The losses of `steps` steps of each stage."
    model = new_model(p)
    if double:
        torch.Tensor.float = torch.Tensor.double # also where the encoders ask for float32; each part has its own process
        model = model.double()
    data = Data(p, model, batch * steps, folder)
    run, found, initial = loop(p, model, data, level), [], copy.deepcopy(model.state_dict())
    for stage in STAGES:
        if not double: model.load_state_dict(initial) # or both would have drifted apart before the stage
        run.start(stage)
        found += [run.step(clips) for clips in np.split(np.arange(batch * steps), steps)]
    return found

def differences(losses):
    "The relative difference of two lists of losses in each step."
    return np.abs(np.subtract(*losses)) / np.abs(losses[0])

def agreement(size, folder, batch=8, steps=2):
    """Losses of the plain loop and of `Trainer` without dropout, in float32 and in float64.

    In float32 the first step of each stage is compared, from the same weights. After an update they drift apart, since Adam
    turns a gradient that is nothing but rounding into a step of full length; in float64 there is no such drift, and all
    steps of the three stages, one after the other, are compared.
    """
    p = profile_of(size).replace(lr=1e-5, dropout=0, block_dropout=0, spec_augment=False, amp=False, text_frozen=0, batch_size=batch)
    last = len(STEPS) - 1
    single = differences([losses_of(p, level, folder, batch, steps) for level in (0, last)])
    # both from stored log-mels, which are float32
    double = differences([losses_of(p, level, folder, batch, steps, True) for level in (1, last)])
    found = dict(first=float(single[::steps].max()), all=float(single.max()), double=float(double.max()))
    if not (found['first'] < 1e-4 and found['double'] < 1e-6):
        raise CmlfError(f'{size}: losses differ: {found}, float32 {single.tolist()}, float64 {double.tolist()}')
    return found

def times_of(p, size, folder, level, batch, repeat):
    "Seconds per clip of a step of each stage, with its share of filling the cache."
    p = p.replace(batch_size=batch)
    model = new_model(p)
    data = Data(p, model, batch, folder)
    run, clips, found = loop(p, model, data, level), np.arange(batch), []
    for stage in STAGES:
        start = time.perf_counter(); run.start(stage); cache = (time.perf_counter() - start) / batch
        run.step(clips)
        best = np.inf
        for _ in range(repeat):
            start = time.perf_counter(); run.step(clips)
            best = min(best, (time.perf_counter() - start) / batch)
        # every epoch of a stage reads the cache
        found.append(best + cache / p.curriculum.epochs)
    return found

def ladder(size, folder, quick):
    p = profile_of(size)
    batch, repeat = (32, 5) if size == 'mini' else (8 if quick else 32, 1)
    if size == 'mini': p = p.replace(text_frozen=0)
    rows = []
    for level, name in enumerate(STEPS):
        log(f'{size}: {name}')
        rows.append([name, *times_of(p, size, folder, level, batch, repeat)])
    if size == 'mini':
        p = profile_of(size)
        rows.append([f'cmlf, {p.text.text_frozen} layers of text frozen', *times_of(p, size, folder, level, batch, repeat)])
    table = pd.DataFrame(rows, columns=['loop', 'stage 1', 'stage 2', 'stage 3'])
    table['clips per second'] = 3 / table[['stage 1', 'stage 2', 'stage 3']].sum(axis=1)
    table['ratio'] = table['clips per second'] / table['clips per second'][0]
    return dict(batch=batch, rows=table.to_dict('records'))

def total(size, folder):
    "The first and the last row of the ladder with 32 pairs a batch."
    p = profile_of(size)
    plain, ours = (np.sum(times_of(p, size, folder, level, 32, 1)) for level in (0, len(STEPS) - 1))
    return dict(plain=3 / plain, ours=3 / ours, ratio=plain / ours)

def rates():
    "Matrix products and convolutions in GFLOP/s, memory in GB/s, measured here."
    def best(f, n=5):
        f(); times = []
        for _ in range(n):
            start = time.perf_counter(); f(); times.append(time.perf_counter() - start)
        return min(times)
    found = {}
    for name, dtype in dict(float32=torch.float32, bf16=torch.bfloat16).items():
        if name == 'bf16' and precision() != 'bf16': continue
        a, b = torch.randn(2048, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
        found[f'matrix {name}'] = 2 * 2048 * 768 * 3072 / best(lambda: a @ b.T) / 1e9
        x, w = torch.randn(8, 128, 250, 16).to(dtype).to(memory_format=torch.channels_last), torch.randn(128, 128, 3, 3).to(dtype)
        found[f'convolution {name}'] = 2 * 8 * 250 * 16 * 128 * 128 * 9 / best(lambda: nn.functional.conv2d(x, w, padding=1)) / 1e9
    a = torch.empty(2**26); b = torch.empty_like(a)
    found['memory'] = 2 * a.numel() * 4 / best(lambda: b.copy_(a)) / 1e9
    return found

def elements(module, x):
    "Numbers that the layers of a module put out, forward."
    n = []
    hooks = [m.register_forward_hook(lambda m, i, o: n.append(o.numel())) for m in module.modules() if not list(m.children()) and
             isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.LayerNorm))]
    with torch.no_grad(): module(x)
    for h in hooks: h.remove()
    return sum(n)

def limit(size, folder):
    "Operations and bytes of a step of stage 3 for one clip, against the rates of the machine."
    p, found = profile_of(size).replace(text_frozen=0), rates()
    model = new_model(p); data = Data(p, model, 8, folder)
    low = precision(p.optimiser.amp)
    inputs = dict(audio=data.pairs.store[np.arange(8)], text=data.pairs.tokens[np.arange(8)])
    rows = []
    for side, kind in dict(audio='convolution', text='matrix').items():
        module = getattr(model, side).train()
        flops = operations(module, inputs[side], p.optimiser.amp) / 8
        size_of = 2 if low == 'bf16' else 4
        moved = 3 * 2 * elements(module, inputs[side]) / 8 * size_of # read and written; backward as twice the forward pass
        x = inputs[side]
        def step():
            with torch.autocast('cpu', torch.bfloat16, enabled=low == 'bf16'): module(x).square().mean().backward()
        step(); times = []
        for _ in range(3):
            start = time.perf_counter(); step(); times.append((time.perf_counter() - start) / 8)
        floor = flops / found[f'{kind} {low}'] / 1e9 + moved / found['memory'] / 1e9
        rows.append({'encoder': side, 'GFLOP': flops / 1e9, 'MB': moved / 1e6, 'floor, ms': 1e3 * floor, 'measured, ms': 1e3 * min(times),
                     'over floor': min(times) / floor})
    return dict(precision=low, rates=found, rows=rows)

def compiled(size):
    "torch.compile of the audio encoder: seconds to compile, and a step against the one without."
    p = profile_of(size)
    encoder = new_model(p).audio.train()
    frames = int(p.audio.seconds * SAMPLE_RATE) // p.audio.hop + 1
    x, low = torch.randn(32 if size == 'mini' else 8, frames, 64), precision(p.optimiser.amp) == 'bf16'
    def seconds(module):
        def step():
            with torch.autocast('cpu', torch.bfloat16, enabled=low): module(x).square().mean().backward()
        start = time.perf_counter(); step(); first = time.perf_counter() - start
        times = []
        for _ in range(3):
            start = time.perf_counter(); step(); times.append(time.perf_counter() - start)
        return first, min(times)
    set_dropout(encoder, True)
    _, eager = seconds(encoder)
    set_dropout(encoder, False)
    try: first, fast = seconds(torch.compile(encoder))
    except Exception as e: return dict(error=str(e).splitlines()[0][:200])
    return dict(compile_seconds=first, eager=eager, compiled=fast, ratio=eager / fast)

PARTS = {f'{what} {size}': (f, size) for size in ('mini', 'paper') for what, f in
         dict(agreement=agreement, ladder=ladder, total=total, limit=limit, compile=compiled).items()
         if (what, size) != ('total', 'mini')} # the ladder of mini has 32 pairs a batch

def run_part(name, folder, quick):
    f, size = PARTS[name]
    return f(size, *{agreement: (folder,), ladder: (folder, quick), limit: (folder,), total: (folder,), compiled: ()}[f])

JOBS = dict(part=run_part)

# ---- the report

def md(rows, digits):
    table = pd.DataFrame(rows)
    for column in table.select_dtypes('number'): table[column] = table[column].map(lambda v: f'{v:.{digits.get(column, 1)}f}')
    return table.to_markdown(index=False)

def page(found):
    m = found['machine']
    lines = ['# Training', '', f"`python benchmarks/training.py`. Measured on {m['device']}, {m['name']}, {m['cores']} cores ({m['cpu']}), "
             f"{m['threads']} threads, trains in {m['precision']}; commit {found['commit']}.", '']
    titles = dict(mini='The profile `mini`', paper="The paper's size: width 64, 10 s, BERT-base")
    for size in ('paper', 'mini'):
        if f'ladder {size}' not in found: continue
        l = found[f'ladder {size}']
        lines += [f'## {titles[size]}', '', f"Milliseconds per clip of a training step, {l['batch']} pairs a batch. Filling the cache of a frozen encoder is counted, "
                  'divided by the epochs of the profile. `ratio` compares clips per second over one epoch of each stage.', '',
                  md([{k: v * 1e3 if k.startswith('stage') else v for k, v in r.items()} for r in l['rows']], {'ratio': 2, 'clips per second': 2 if size == 'paper' else 1}), '']
        if t := found.get(f'total {size}'):
            lines += [f"With 32 pairs a batch: {t['plain']:.2f} clips per second in the plain loop, {t['ours']:.2f} in cmlf, ratio {t['ratio']:.2f}.", '']
        if f'agreement {size}' in found:
            a = found[f'agreement {size}']
            lines += [f"Losses of the plain loop and of `Trainer` without dropout, largest relative difference: {a['first']:.1e} in the first step of each "
                      f"stage in float32 ({a['all']:.1e} over two steps of each, as rounding grows with Adam's updates); {a['double']:.1e} over "
                      "all of these steps in float64.", '']
        if f'limit {size}' in found:
            f = found[f'limit {size}']
            lines += ['One clip or caption, forward and backward, 8 at a time. The floor is operations at the measured rate of convolutions (audio) or '
                      'matrix products (text), plus the outputs of all layers, written and read at the measured rate of memory: '
                      + ', '.join(f"{k} {v:.0f} {'GB/s' if k == 'memory' else 'GFLOP/s'}" for k, v in f['rates'].items()) + '.', '',
                      md(f['rows'], {'GFLOP': 2, 'over floor': 2}), '']
        if c := found.get(f'compile {size}'):
            lines += [f"`torch.compile` of the audio encoder: {c['error']}" if 'error' in c else
                      f"`torch.compile` of the audio encoder: {c['compile_seconds']:.0f} s to compile, then {c['ratio']:.2f} times as fast as without.", '']
    if 'ladder paper' in found or 'ladder mini' in found: lines += ['![clips per second after each step](training.png)', '']
    return '\n'.join(lines)

def picture(found, path):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    sizes = [s for s in ('paper', 'mini') if f'ladder {s}' in found]
    fig, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 3), layout='constrained', squeeze=False)
    for ax, size in zip(axes[0], sizes):
        t = pd.DataFrame(found[f'ladder {size}']['rows'])[::-1]
        left = 0
        for stage in ('stage 1', 'stage 2', 'stage 3'):
            ax.barh(t['loop'], t[stage] * 1e3, left=left, label=stage); left = left + t[stage] * 1e3
        ax.set(xlabel='ms per clip, one step of each stage', title=size)
        ax.legend(frameon=False)
    fig.savefig(path, dpi=90); plt.close(fig)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--captions', default=os.environ.get('CMLF_AUDIOCAPS_CSV', ''), help='folder of the csv files of AudioCaps')
    parser.add_argument('--parts', default='', help=f"some of: {', '.join(PARTS)}; separated by commas")
    parser.add_argument('--out', type=Path, default=ROOT/'reports'/'benchmarks')
    parser.add_argument('--quick', action='store_true', help='8 clips a batch at the paper size')
    parser.add_argument('--job', default='', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job: return answer(args.job, JOBS)
    names = [one_of(n.strip(), PARTS, 'part') for n in args.parts.split(',')] if args.parts else list(PARTS)
    path = args.out/'training.json'
    found = read_json(path) if path.exists() and args.parts else {}
    for name in names: # each in a new process: no memory and no changed module is left over
        log(name)
        found[name] = run_job(__file__, 'part', dict(name=name, folder=args.captions, quick=args.quick))
    found |= dict(machine=machine(), commit=commit())
    write_json(path, found)
    rows = [dict(size=s, **r) for s in ('paper', 'mini') if f'ladder {s}' in found for r in found[f'ladder {s}']['rows']]
    if rows: # some parts alone have no ladder
        write_text(args.out/'training.csv', pd.DataFrame(rows).to_csv(index=False))
        picture(found, args.out/'training.png')
    write_text(args.out/'training.md', page(found))
    print(page(found))

if __name__ == '__main__':
    try: main()
    except CmlfError as e: log(f'training: {e}'); sys.exit(2)
