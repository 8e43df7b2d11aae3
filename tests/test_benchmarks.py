"The benchmark of a GPU, at a tiny size on the CPU: every part runs, its checks pass, and they can fail."
import importlib.util, json, os, subprocess, sys

import pandas as pd
import pytest
import torch

from command import ROOT
from cmlf.config import get_profile

def run_gpu(out, *arguments):
    return subprocess.run([sys.executable, ROOT/'benchmarks'/'gpu.py', '--out', out, '--runs', out/'runs', *arguments], cwd=ROOT,
                          env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)

@pytest.fixture
def gpu(monkeypatch):
    "The script as a module, with the tiny profile."
    monkeypatch.setenv('CMLF_DEVICE', 'cpu')
    monkeypatch.syspath_prepend(ROOT/'benchmarks') # as for a script
    spec = importlib.util.spec_from_file_location('gpu', ROOT/'benchmarks'/'gpu.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.tiny = get_profile('audiocaps').replace(**module.SMALL)
    return module

def test_gpu_benchmark_runs_without_a_gpu(tmp_path):
    done = run_gpu(tmp_path, '--device', 'cpu', '--small')
    assert done.returncode == 0, done.stderr
    found, table = json.loads((tmp_path/'gpu.json').read_text()), pd.read_csv(tmp_path/'gpu.csv')
    assert {'machine', 'commit', 'size', 'agreement', 'sync', 'steps', 'field'} == set(found) and found['machine']['device'] == 'cpu'
    agreement = found['agreement']
    assert agreement['agree'] and set(agreement['softplus']) == {'loss', 'audio', 'text', 'audio_head', 'text_head'}
    assert 0 < max(agreement['softplus'].values()) < agreement['tolerance'] == 1e-4 # zero: compared with itself
    assert [r['step'] for r in found['sync']['rows']] == ['', '', ''] and 'skipped' in found['field']
    assert list(table.stage) == [1, 1, 2, 3, 3, 3] and list(table.compiled.dropna()) == ['eager']
    assert (table[['clips_per_second', 'gflop_per_clip', 'share', 'peak_gb']] > 0).all(axis=None)
    joint, audio, text = (table.gflop_per_clip[i] for i in (3, 0, 2))
    assert joint > max(audio, text)
    assert '## Clips per second' in (tmp_path/'gpu.md').read_text()

@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_gpu_benchmark_needs_a_gpu(tmp_path):
    done = run_gpu(tmp_path)
    assert done.returncode == 2 and '--device cpu --small' in done.stderr and len(done.stderr.splitlines()) == 1

def test_a_step_that_needs_values_is_found(gpu):
    trainer = gpu.trainer_of(gpu.tiny, 2, 1)
    audio, tokens = trainer.fetch(gpu.pair_of(gpu.tiny))
    assert gpu.without_values(trainer, (audio, tokens)) == ''
    without = {k: v for k, v in tokens.items() if k != 'real'} # then the encoder looks for the tokens of the batch
    assert 'nonzero' in gpu.without_values(trainer, (audio, without))

def test_disagreement_is_found(gpu, monkeypatch):
    exact = gpu.loss_and_gradients
    def changed(model, batch, loss):
        if next(model.parameters()).dtype == torch.float32: model.audio_head[0].weight.data[0] *= 1.01
        return exact(model, batch, loss)
    monkeypatch.setattr(gpu, 'loss_and_gradients', changed)
    found = gpu.agreement(gpu.tiny, None)
    assert not found['agree']
    with pytest.raises(gpu.CmlfError, match='disagree'): gpu.check(dict(agreement=found))
    with pytest.raises(gpu.CmlfError, match='host waits'): gpu.check(dict(sync=dict(rows=[dict(stage=1, step='nonzero')])))
