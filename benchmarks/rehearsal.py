"""Test the AudioCaps profile at full size: real captions, synthetic sounds of one second, tiny encoders.

    python benchmarks/rehearsal.py --captions /path/to/csv_files

All steps of a real run are executed once: log-mel store, ancillary vectors, mining of the whole training set, the three
stages, MoEE and CE on feature files, evaluation, Tables I-III. The scores have no meaning. Minutes, peak memory and disk
space are written to reports/benchmarks/rehearsal.json. The report itself contains captions and stays in the run folder.
"""
import argparse, json, os, resource, subprocess, sys, time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import soundfile

from cmlf.core import CmlfError, Progress, machine, rng, log, write_json
from cmlf.layouts import load_corpus

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = dict(audio=(10, 128), vggsound=(32, 512))  # (tokens, width) of the reference's features
KINDS = 'baseline-scratch-* 3cmlf-scratch-chm-* experts-* ce-* moee-*'  # one run of each kind; also batch sizes 16 and 64

def stand_in(name:str, rate:int=8000) -> np.ndarray:
    "One second of a tone and noise, determined by the name."
    r = rng(0, 'stand-in', name)
    t = np.arange(rate) / rate
    return (0.3 * np.sin(2 * np.pi * r.uniform(100, 3000) * t) + r.uniform(-0.1, 0.1, rate)).astype(np.float32)

def make_tree(captions:Path, tree:Path, clips:int):
    "csv_files/ with the real captions, and waveforms/ with a synthetic sound for each clip."
    (tree/'csv_files').mkdir(parents=True, exist_ok=True)
    (tree/'waveforms').mkdir(exist_ok=True)
    for split in ('train', 'val', 'test'):
        path = captions/f'{split}.csv'
        if not path.exists(): raise CmlfError(f'{path}: not found; --captions should be the folder of train.csv, val.csv and test.csv')
        table = pd.read_csv(path)
        table = table.head(clips) if clips else table
        table.to_csv(tree/'csv_files'/f'{split}.csv', index=False)
        with Progress(len(table), f'synthetic sounds of {split}') as bar:
            for name in table.file_name:
                if not (tree/'waveforms'/name).exists(): soundfile.write(tree/'waveforms'/name, stand_in(name), 8000)
                bar.step()

def make_features(tree:Path):
    "Random features in HDF5 files: one file per expert, one dataset per clip."
    ids = [c.id for c in load_corpus(tree, 1.0, audio=False).clips]
    for name, (tokens, width) in EXPERTS.items():
        path = tree/f'{name}.h5'
        if path.exists(): continue
        with h5py.File(path.with_suffix('.part'), 'w') as f:
            for i in ids: f[i] = rng(0, name, i).normal(size=(tokens, width)).astype(np.float16)
        os.replace(path.with_suffix('.part'), path)

def disk(folder) -> float:
    "Size of all files in a folder, in GB."
    return sum(f.stat().st_size for f in Path(folder).rglob('*') if f.is_file()) / 2**30

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--captions', default=os.environ.get('CMLF_AUDIOCAPS_CSV'), help='folder of the csv files (CMLF_AUDIOCAPS_CSV)')
    parser.add_argument('--out', type=Path, default=ROOT/'runs'/'rehearsal')
    parser.add_argument('--clips', type=int, default=0, help='number of clips of each split; 0: all')
    args = parser.parse_args()
    if not args.captions: raise CmlfError('no captions: give the folder of the AudioCaps csv files by --captions or CMLF_AUDIOCAPS_CSV')
    start, tree = time.time(), args.out/'stand-in sounds'
    make_tree(Path(args.captions), tree, args.clips)
    make_features(tree)
    made = time.time()
    features = ','.join(f'{n}={tree/n}.h5' for n in EXPERTS)
    small = dict(corpus='manifest', width=4, text_model='tiny', head_hidden=64, joint_dim=128, seconds=1, epochs=3, budget='equal_epochs', stage_split='1+1+1',
                 ce_epochs=1, expert_features=features)
    command = [sys.executable, '-c', 'from cmlf.cli import main; main()', 'reproduce', '--profile', 'audiocaps', '--data', str(tree),
               '--runs', str(args.out/'runs'), '--out', str(args.out/'report'), '--only', KINDS]
    for key, value in small.items(): command += ['--set', f'{key}={value}']
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    clips = {s: len(pd.read_csv(tree/'csv_files'/f'{s}.csv')) for s in ('train', 'val', 'test')}
    record = dict(clips=clips, minutes_making_stand_ins=round((made - start) / 60, 1), minutes=round((time.time() - made) / 60, 1),
                  peak_memory_gb=round(peak, 2), disk_gb=dict(stand_ins=round(disk(tree), 2), runs=round(disk(args.out/'runs'), 2)),
                  machine=machine())
    write_json(ROOT/'reports'/'benchmarks'/'rehearsal.json' if not args.clips else args.out/'rehearsal.json', record)
    print(json.dumps(record, indent=1))

if __name__ == '__main__':
    try: main()
    except CmlfError as e: log(f'rehearsal: {e}'); sys.exit(2)
