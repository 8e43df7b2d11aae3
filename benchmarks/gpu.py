"""Training on a GPU: agreement with the CPU, clips per second, share of the card's matrix rate, and the whole `field` profile.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --events /path/to/ESC-10        # also the tables of the profile `field`
    python benchmarks/gpu.py --device cpu --small            # the same code at a tiny size, without a GPU

The size is that of the paper: ResNet38 of width 64 on 10 s, a BERT-base with random weights, batches of 32. Log-mels and captions
are random. Writes gpu.md, .csv and .json to reports/benchmarks/gpu (with --small to runs/gpu). If CPU and GPU disagree, or if a step
makes the host wait for the GPU, the script ends with an error. `--parts steps` repeats one part.
"""
import argparse, copy, os, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from cmlf.appendix.loading import DeviceStore
from cmlf.config import get_profile
from cmlf.core import CmlfError, commit, device, log, machine, one_of, precision, read_json, rng, seed_everything, write_json, write_text
from cmlf.encoders import DualEncoder, ResidualBlock
from cmlf.experiments import matrix_rate
from cmlf.features import SAMPLE_RATE
from cmlf.loss import get_loss
from cmlf.training import PairedSplit, Stage, Tokens, Trainer
from shared import peak_gb, random_bert

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4
# batches are random in all stages: mining is measured in benchmarks/mining.py
STAGES = [Stage('random', which, 1) for which in ('audio', 'text', 'both')]
SMALL = dict(width=4, seconds=1, head_hidden=64, joint_dim=32, batch_size=8, text_model='tiny')

# ---- inputs

def profile_of(args):
    "The settings of the paper, or those of a tiny model."
    p = get_profile('audiocaps')
    return p.replace(**SMALL) if args.small else p.replace(text_model=random_bert(args.runs/'gpu'/'random-bert-base'))

def waves(n, frames):
    "(n, frames, 64) log-mels in dB: for each clip four random waves over time and frequency, and noise."
    r, x = rng(0, 'log-mels', n), 0 # noise alone would give all clips nearly the same embedding
    time_of, band = np.linspace(0, 1, frames)[:, None], np.linspace(0, 1, 64)
    for _ in range(4):
        a, b, c, d = r.uniform(size=(4, n, 1, 1))
        x = x + np.cos(2 * np.pi * ((1 + 5 * a) * time_of + b)) * np.cos(2 * np.pi * ((1 + 4 * c) * band + d))
    return -40 + 12 * x + r.normal(0, 3, (n, frames, 64))

class Store:
    "Random log-mels in main memory; `store[indices]` -> float32, as a `FeatureStore`."
    def __init__(self, n, p): self.rows = waves(n, int(p.audio.seconds * SAMPLE_RATE) // p.audio.hop + 1).astype(np.float16)

    def __len__(self): return len(self.rows)
    def __getitem__(self, indices): return torch.from_numpy(self.rows[np.asarray(indices)]).float()

def captions_of(n):
    "Random captions of 6 to 20 words."
    r, words = rng(0, 'captions', n), 'a dog barks while the rain falls and an engine starts far away from people who talk'.split()
    return [' '.join(r.choice(words, r.integers(6, 21))) for _ in range(n)]

def split_of(model, p, batches):
    "A random split; with its captions, as `PairedSplit`."
    n = batches * p.batches.batch_size
    return PairedSplit(Store(n, p), Tokens(model.text, captions_of(n)), np.arange(n), np.arange(n))

def model_of(p):
    "The model of a profile with random weights. Residual blocks begin as the identity; here they do not: all weights have gradients."
    seed_everything(0)
    model = DualEncoder.from_profile(p)
    for m in model.modules():
        if isinstance(m, ResidualBlock): torch.nn.init.constant_(m.bn2.weight, .5)
    return model

def trainer_of(p, stage, batches=4):
    "A trainer at the start of a stage, and a batch for it."
    model = model_of(p)
    trainer = Trainer(model, split_of(model, p, batches), split_of(model, p, 1), p, STAGES, log=lambda line: None)
    return at_stage(trainer, stage)

def at_stage(trainer, stage):
    trainer.stage, trainer.epoch = stage, 0
    trainer.start_stage()
    return trainer

def pair_of(p): return np.arange(p.batches.batch_size), np.arange(p.batches.batch_size)

# ---- agreement: one float32 step here and there

def loss_and_gradients(model, batch, loss):
    "The loss of a batch as a number, and the gradients of each part of the model as one float64 vector on the CPU."
    found = loss(*model(batch))
    found.backward()
    parts = {name: torch.cat([q.grad.flatten().double().cpu() for q in getattr(model, name).parameters() if q.grad is not None])
             for name in ('audio', 'text', 'audio_head', 'text_head')}
    return found.item(), parts

def reference(model, batch, loss, double):
    "The same on the CPU, in float32 or in float64."
    if not double: return loss_and_gradients(model, batch, loss)
    as_double = lambda x: x.double() if x.is_floating_point() else x
    with patch.object(torch.Tensor, 'float', lambda x: x.double()): # encoders return float32: here they stay in float64
        return loss_and_gradients(model.double(), tree_map(as_double, batch), loss)

def softplus(x, inplace=False): return torch.nn.functional.softplus(x)

def apart(p):
    "Relative differences of the loss, and of the norm of the gradients of each part."
    model, loss, dev = model_of(p).train(), get_loss('nt_xent', tau=p.optimiser.tau), device()
    pairs, index = split_of(model, p, 1), torch.arange(p.batches.batch_size)
    batch = pairs.store[index], pairs.tokens[index]
    expected, gradients = reference(copy.deepcopy(model), batch, loss, double=dev.type == 'cpu')
    found, other = loss_and_gradients(model.to(dev), tree_map(lambda x: x.to(dev), batch), loss)
    return dict(loss=abs(found - expected) / abs(expected),
                **{name: float((other[name] - g).norm() / g.norm()) for name, g in gradients.items()})

def agreement(p, args):
    "GPU against CPU in float32; without a GPU, float32 against float64. With ReLU, and with softplus in its place."
    p = p.replace(dropout=0, block_dropout=0, spec_augment=False, batch_size=8)
    tf32 = [(b, b.allow_tf32) for b in (torch.backends.cuda.matmul, torch.backends.cudnn)]
    for backend, _ in tf32: backend.allow_tf32 = False
    relu = apart(p)
    with patch.object(torch.nn.functional, 'relu', softplus): smooth = apart(p)
    for backend, before in tf32: backend.allow_tf32 = before
    return dict(reference='float64' if device().type == 'cpu' else 'float32 on the CPU', relu=relu, softplus=smooth,
                tolerance=TOLERANCE, agree=max(relu['loss'], *smooth.values()) < TOLERANCE)

# ---- steps: clips per second

def first_line(e): return (str(e).splitlines() or [''])[0]

def operations_of(trainer):
    "Operations of matrix products and convolutions in one step, per clip."
    batch = trainer.fetch(pair_of(trainer.profile))
    with FlopCounterMode(display=False) as counter: trainer.step(batch, 0.)
    return counter.get_total_flops() / trainer.profile.batches.batch_size

def epoch_seconds(trainer, times):
    "The shortest of several epochs; one before them is not timed."
    best = np.inf
    for i in range(times + 1):
        began = time.perf_counter()
        trainer.one_epoch() # returns a number, so the GPU has finished
        if i: best = min(best, time.perf_counter() - began)
    return best

def timed(trainer, rate, times, **what):
    "One row of the table."
    if device().type == 'cuda': torch.cuda.reset_peak_memory_stats()
    operations, s = operations_of(trainer), trainer.stages[trainer.stage]
    speed = len(trainer.train) / epoch_seconds(trainer, times)
    return dict(stage=trainer.stage + 1, trains=s.trainable, **what, clips_per_second=speed, gflop_per_clip=operations / 1e9,
                gflops=operations * speed / 1e9, share=operations * speed / rate, peak_gb=peak_gb())

def compiled(trainer, rate, times, backend):
    "The joint stage with torch.compile for the audio encoder; the reason where that does not work."
    trainer.model.audio.compile(backend=backend)
    try: return timed(trainer, rate, times, log_mels='on the device', compiled=backend)
    except Exception as e: # the types of the compiler's errors are not documented
        return dict(stage=3, trains='both', log_mels='on the device', compiled=backend, error=f'{type(e).__name__}: {first_line(e)}')

def steps(p, args):
    "Clips per second of each stage, with log-mels on the device and read ahead; and with a compiled audio encoder."
    (batches, times), rate, rows = (2, 1) if args.small else (16, 3), matrix_rate(p.optimiser.amp), []
    trainer = trainer_of(p, 0, batches)
    plain = split_of(trainer.model, p, batches)
    stores = {'on the device': DeviceStore(plain.store.rows, device()), 'read ahead': plain.store}
    for stage, s in enumerate(STAGES):
        for where, store in stores.items():
            if s.trainable == 'text' and where == 'read ahead': continue # outputs of the frozen audio encoder are on the device
            trainer.train = replace(plain, store=store)
            rows.append(timed(at_stage(trainer, stage), rate, times, log_mels=where))
            log(f'stage {stage + 1}, log-mels {where}: {rows[-1]["clips_per_second"]:.1f} clips per second')
    trainer.train = replace(plain, store=stores['on the device'])
    rows.append(compiled(at_stage(trainer, 2), rate, times, 'eager' if args.small else 'inductor'))
    return dict(precision=precision(p.optimiser.amp), matrix_gflops=rate / 1e9, batch_size=p.batches.batch_size, rows=rows)

# ---- sync: nothing in a step may make the host wait

def on_card(f):
    "What PyTorch reports if `f` makes the host wait for the GPU; '' if it does not."
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: f()
    except RuntimeError as e: return first_line(e)
    finally: torch.cuda.set_sync_debug_mode('default')
    return ''

def without_values(trainer, batch):
    "Which operation of a step needs the values of a tensor, and so would wait for a GPU; '' if none does."
    from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException, FakeCopyMode,
                                               FakeTensorMode)
    mode, fake = FakeTensorMode(), copy.copy(trainer)
    with FakeCopyMode(mode): fake.model = copy.deepcopy(trainer.model)
    of = dict(zip(trainer.model.parameters(), fake.model.parameters()))
    groups = [dict(params=[of[q] for q in g['params']], lr=g['lr'], peak=g['peak']) for g in trainer.optimiser.param_groups]
    fake.optimiser = torch.optim.Adam(groups, fused=True)
    try:
        with mode: fake.step(tree_map(mode.from_tensor, batch), 0.)
    except (DataDependentOutputException, DynamicOutputShapeException) as e: return f'{e.func}'
    return ''

def sync(p, args):
    "Per stage: what makes the host wait in a step, and while a batch is fetched; '' if nothing does."
    on_cuda, rows = device().type == 'cuda', []
    for stage, s in enumerate(STAGES):
        trainer = trainer_of(p, stage, 1)
        batch = trainer.fetch(pair_of(p))
        trainer.step(batch, 0.) # the first step initialises libraries and the optimiser
        step = on_card(lambda: trainer.step(batch, 0.)) if on_cuda else without_values(trainer, batch)
        rows.append(dict(stage=stage + 1, trains=s.trainable, step=step,
                         fetch=on_card(lambda: trainer.fetch(pair_of(p))) if on_cuda else None))
    return dict(how="torch.cuda.set_sync_debug_mode('error')" if on_cuda else 'tensors without values', rows=rows)

# ---- field: all tables of the profile

def field(p, args):
    "Wall time of `cmlf reproduce --profile field`, and its tables."
    if device().type != 'cuda': return dict(skipped='the tables of the profile `field` are computed on a GPU only')
    if not args.events: return dict(skipped='no recordings: give their folder by --events or CMLF_ESC_DIR')
    args.runs.mkdir(parents=True, exist_ok=True)
    folder, began = Path(tempfile.mkdtemp(prefix='gpu-field-', dir=args.runs)), time.time()
    subprocess.run([sys.executable, '-c', 'from cmlf.cli import main; main()', 'reproduce', '--profile', 'field', '--events', args.events,
                    '--runs', str(folder/'runs'), '--out', str(folder/'report')], check=True)
    return dict(minutes=(time.time() - began) / 60, tables=[(folder/'report'/f'table{n}.md').read_text() for n in (1, 2, 3)])

PARTS = dict(agreement=agreement, sync=sync, steps=steps, field=field)

# ---- report

def agreement_section(a):
    t = pd.DataFrame({name: a[name] for name in ('relu', 'softplus')}).map('{:.1e}'.format)
    return f"""## One step in float32

Compared with {a['reference']}: the same weights, the same batch of 8, no dropout, no TF32. Relative differences of the loss, and of the
gradients of each part (in the norm):

{t.to_markdown(disable_numparse=True)}

A ReLU whose input is near zero can be open in one computation and closed in the other. Then the gradients differ by much more than the
rounding that caused it. So gradients are compared with softplus in place of ReLU; the loss is compared with both.
{'All of these agree' if a['agree'] else 'These DISAGREE'} (less than {a['tolerance']:g}).
"""

def sync_section(x):
    said = lambda v: 'not checked' if v is None else v or 'nothing'
    t = pd.DataFrame([r | dict(step=said(r['step']), fetch=said(r['fetch'])) for r in x['rows']])
    return f"""## What makes the host wait

Checked by: {x['how']}.

{t.to_markdown(index=False)}
"""

def table(rows):
    forms = dict(clips_per_second='.1f', gflop_per_clip='.3g', gflops='.0f', share='.1%', peak_gb='.2f')
    t = pd.DataFrame(rows)
    for c, form in forms.items(): t[c] = t[c].map(lambda v: '' if pd.isna(v) else format(v, form))
    return t.astype(object).where(t.notna(), '').to_markdown(index=False, disable_numparse=True)

def steps_section(x):
    return f"""## Clips per second

Batches of {x['batch_size']}, trained in {x['precision']}. Whole epochs of the trainer: fetching, forward, backward, clipping and Adam. `share`: of the rate
of a large matrix product in {x['precision']} on the same device, {x['matrix_gflops']:,.0f} GFLOP/s. Operations are those of matrix products and convolutions.

{table(x['rows'])}
"""

def field_section(x):
    if 'skipped' in x: return f'## The profile `field`\n\nNot measured: {x["skipped"]}.\n'
    return f'## The profile `field`\n\nAll tables in {x["minutes"]:.0f} minutes.\n\n' + '\n\n'.join(x['tables'])

SECTIONS = dict(agreement=agreement_section, sync=sync_section, steps=steps_section, field=field_section)

def report(found):
    on, size = found['machine'], found['size']
    head = f"""# GPU

`python benchmarks/gpu.py`: ResNet38 of width {size['width']}, {size['seconds']:g} s, text model {size['text']} with random weights, random inputs.
Measured on {on['device']}, {on['name']}, {on['cores']} cores ({on['cpu']}), {'with' if on['bf16'] else 'without'} bf16; commit {found['commit']}.
"""
    return '\n'.join([head, *(SECTIONS[p](found[p]) for p in PARTS if p in found)])

def write(found, out):
    write_json(out/'gpu.json', found)
    write_text(out/'gpu.md', report(found))
    if 'steps' in found: write_text(out/'gpu.csv', pd.DataFrame(found['steps']['rows']).round(6).to_csv(index=False))

def check(found):
    "Raise an error if CPU and device disagree, or if a step makes the host wait."
    if not found.get('agreement', {}).get('agree', True): raise CmlfError(f'CPU and device disagree: {found["agreement"]}')
    for r in found.get('sync', {}).get('rows', []):
        if r['step']: raise CmlfError(f'stage {r["stage"]}: the host waits in a step: {r["step"]}')

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', help='device to measure (default: %(default)s)')
    parser.add_argument('--small', action='store_true', help='a tiny size, to try the command')
    parser.add_argument('--parts', default=','.join(PARTS), help='parts to measure (default: %(default)s)')
    parser.add_argument('--events', default=os.environ.get('CMLF_ESC_DIR', ''), help='folder of recordings, for the part field (CMLF_ESC_DIR)')
    parser.add_argument('--runs', default=os.environ.get('CMLF_RUNS', ROOT/'runs'), type=Path, help='folder of intermediate files')
    parser.add_argument('--out', type=Path, help='folder of the results')
    return parser.parse_args()

def main():
    args = arguments()
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise CmlfError('no GPU is available; `--device cpu --small` runs the same code on a CPU')
    os.environ['CMLF_DEVICE'] = args.device
    parts = [one_of(p, PARTS, 'part') for p in args.parts.split(',')]
    out, p = args.out or (args.runs/'gpu' if args.small else ROOT/'reports'/'benchmarks'/'gpu'), profile_of(args)
    out.mkdir(parents=True, exist_ok=True)
    found = read_json(out/'gpu.json') if (out/'gpu.json').exists() else {}
    found.update(machine=machine(), commit=commit(),
                 size=dict(width=p.audio.width, seconds=p.audio.seconds, text='tiny' if args.small else 'BERT-base'))
    for part in parts:
        log(f'{part} ...')
        found[part] = PARTS[part](p, args)
        write(found, out)
    log(f'{out/"gpu.md"} written')
    check(found)

if __name__ == '__main__':
    try: main()
    except CmlfError as e: log(f'gpu: {e}'); sys.exit(2)
