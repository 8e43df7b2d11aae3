"Work that a process does until it is killed, and what is left of it in the end; test_killed.py imports it."
import random, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

import cmlf.appendix.resume as resume
import cmlf.features as features
from cmlf.config import get_profile
from cmlf.experiments import Experiment
from command import context

PROFILE = get_profile('smoke').replace(n_train=32, n_test=8, pretrain_scenes=32)

# --- the work

def prepare():
    "In the process that works, and only there: write the state after many steps; one thread."
    resume.Checkpoint.late = lambda self: bool(self.path) and not time.monotonic_ns() // 1000 % 3
    torch.set_num_threads(1)

def experiment(folder): return Experiment(PROFILE, folder)

def three_stages(folder):
    "The tagger, joint training from its weights, ancillary vectors, and the three stages; then CE with its experts."
    exp = experiment(folder)
    exp.run(exp.spec('3cmlf', 'pretrained', True))

def ce(folder):
    exp = experiment(folder)
    exp.run(exp.spec('ce'))

def feature_store(folder):
    "A store whose clips take some time, and which notes every row."
    def read(i): time.sleep(.01); return np.random.default_rng(i).normal(size=3200).astype(np.float32)
    features.build_store(folder, [str(i) for i in range(40)], read, features.LogMel(), .1, workers=0)

WORK = dict(three_stages=three_stages, ce=ce, feature_store=feature_store)

# --- what is left

def left(folder) -> dict:
    "{file: arrays, tables or bytes}, without times and names of attempts."
    found = {}
    for f in sorted(Path(folder).rglob('*')):
        name = f.relative_to(folder).as_posix()
        if f.suffix == '.npz': found[name] = {k: v for k, v in np.load(f).items() if k != 'seconds'}
        elif f.suffix == '.safetensors': found[name] = {k: v.numpy() for k, v in load_file(f).items()}
        elif f.suffix == '.npy': found[name] = dict(rows=np.load(f))
        elif f.name == 'history.csv':
            found[name] = {k: v.to_numpy() for k, v in pd.read_csv(f).items() if 'seconds' not in k}
        elif f.is_file() and f.name not in ('run.json', 'hashes.json') and f.suffix != '.lock': found[name] = dict(bytes=f.read_bytes())
    return found

def differences(a, b) -> list:
    "The names of what differs between two results of `left`, bit for bit."
    names = sorted(set(a) ^ set(b))
    for name in set(a) & set(b):
        if set(a[name]) != set(b[name]): names.append(name); continue
        for key, x in a[name].items():
            y = b[name][key]
            same = x == y if isinstance(x, bytes) else x.dtype == y.dtype and (
                x.tobytes() == y.tobytes() if x.dtype != object else list(x) == list(y))
            if not same: names.append(f'{name}: {key}')
    return names

# --- processes that are killed

def do(work, folder):
    prepare()
    WORK[work](folder)

def start(work, folder):
    process = context.Process(target=do, args=(work, folder))
    process.start()
    return process

def run_whole(work, folder) -> float:
    "Run work to its end; returns seconds."
    began, process = time.monotonic(), start(work, folder)
    process.join()
    assert process.exitcode == 0, f'{work}: exit code {process.exitcode}'
    return time.monotonic() - began

def run_killed(work, folder, seconds, kills, stream:random.Random) -> int:
    "Kill work at random moments, start it again, and let it end at last; returns how often it was killed."
    killed = 0
    for _ in range(kills): # together about as long as the work takes
        process = start(work, folder)
        process.join(stream.uniform(0, seconds if kills == 1 else 2 * seconds / kills))
        if process.is_alive(): process.kill(); killed += 1
        process.join()
        if process.exitcode == 0: break
    run_whole(work, folder)
    return killed
