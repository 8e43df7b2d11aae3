"One run in two processes: the loss, gradients, statistics and weights of one process; `accelerate launch`; a process that is killed."
import contextlib, os, re, subprocess, sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import distributed
from torch.multiprocessing import start_processes

from cmlf.appendix import distributed as here
from cmlf.appendix.distributed import average_gradients, joined, processes, rank, reduce_batch_norm
from cmlf.cli import run_command
from cmlf.config import get_profile
from cmlf.core import CmlfError, rng, seed_everything
from cmlf.data import write_corpus
from cmlf.encoders import DualEncoder
from cmlf.features import LogMel, build_store
from cmlf.soundscapes import compose
from cmlf.training import PairedSplit, Stage, Trainer
from command import ROOT

pytest.importorskip('accelerate')
PLAIN = dict(dropout=0, block_dropout=0, spec_augment=False, amp=False) # nothing random in a step
SMALL = dict(n_train=32, n_val=9, n_test=9) # odd: shares of what is encoded are not equal
STAGES = [Stage('easy', 'audio', 1), Stage('random', 'text', 1), Stage('hard', 'both', 1)]

# -- the same work in one and in two processes

@contextlib.contextmanager
def floats(method):
    "A block in which `Tensor.float` is another method: the encoders ask for float32 in several places."
    kept, torch.Tensor.float = torch.Tensor.float, method
    try: yield
    finally: torch.Tensor.float = kept

FLOAT, DOUBLE = torch.Tensor.float, torch.Tensor.double

def trainer_in(folder, **settings):
    "Three short stages on 32 scenes, in float64."
    profile = get_profile('smoke', PLAIN | SMALL | dict(lr=1e-3, text_lr=1e-3) | settings)
    corpus, log_mel = compose(profile), LogMel(hop=profile.audio.hop)
    seed_everything(0 if not rank() else 100) # the weights should come from the first process
    model = DualEncoder.from_profile(profile).double()
    def paired(split):
        part = corpus.split(split)
        return PairedSplit.of(part, build_store(folder, part.keys, part.waveform, log_mel, profile.audio.seconds), model)
    train, val, test = map(paired, ('train', 'val', 'test'))
    vectors = rng(0, 'vectors').standard_normal((len(train), 8)).astype(np.float32)
    trainer = Trainer(model, train, val, profile, STAGES, vectors=vectors, test=test, log=lambda line: None)
    trainer.batches = floats(FLOAT)(trainer.batches) # mining is in float32 as always
    return trainer

def one_step(trainer, training):
    "Loss, gradients and BatchNorm statistics of one hard batch."
    trainer.stage = 2
    trainer.start_stage()
    trainer.model.train(training)
    batch = trainer.batches()[0]
    trainer.model.zero_grad()
    loss = trainer.loss_of(trainer.fetch((batch, batch)))
    loss.backward()
    average_gradients(trainer.model.parameters())
    return dict(loss=loss.detach(), gradients={n: w.grad for n, w in trainer.model.named_parameters() if w.grad is not None},
                statistics={n: b for n, b in trainer.model.named_buffers() if 'running' in n or 'tracked' in n})

def whole_run(trainer):
    "History and weights of all stages, and the clips of every batch (of a share of it) in order."
    seen, fetch = [], trainer.fetch
    trainer.fetch = lambda pair: (seen.append(here.share(pair[0])), fetch(pair))[1]
    history = trainer.fit()
    return dict(history=history, weights=trainer.model.state_dict(), seen=seen, test=trainer.stage_outputs[-1]['audio'])

def local(trainer):
    "One step with the loss of the local pairs, as without this page."
    import cmlf.training as training
    kept, training.gather = training.gather, lambda x: x
    try: return one_step(trainer, False)
    finally: training.gather = kept

def not_reduced(trainer):
    "One step with the BatchNorm of PyTorch, on the statistics of the share."
    for m in trainer.model.modules():
        if isinstance(m, here.ReducedBatchNorm): m.__class__ = torch.nn.BatchNorm1d if m is trainer.model.audio.bn0 else torch.nn.BatchNorm2d
    return one_step(trainer, True)

def all_work(folder):
    "Everything that is compared; float64 throughout, also where the encoders ask for float32."
    with floats(DOUBLE):
        make = partial(trainer_in, folder)
        return dict(eval=one_step(make(), False), train=one_step(make(), True), run=whole_run(make()), local=local(make()),
                    not_reduced=not_reduced(make()))

def in_process(i, n, folder):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder}/meeting', rank=i, world_size=n)
    found = all_work(folder)
    try: trainer_in(folder, batch_size=7)
    except CmlfError as e: found['refused'] = str(e)
    torch.save(found, folder/f'{i}.pt')

@pytest.fixture(scope='module')
def one(tmp_path_factory): return all_work(tmp_path_factory.mktemp('one'))

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    start_processes(in_process, (2, folder), 2, start_method='spawn')
    return [torch.load(folder/f'{i}.pt', weights_only=False) for i in range(2)]

def difference(a, b):
    assert set(a) == set(b)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)

@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_loss_gradients_and_statistics_are_those_of_one_process(one, two, mode):
    for process in two:
        assert process[mode]['loss'].dtype == torch.float64
        assert float((process[mode]['loss'] - one[mode]['loss']).abs()) < 1e-6
        assert difference(process[mode]['gradients'], one[mode]['gradients']) < 1e-6
        assert difference(process[mode]['statistics'], one[mode]['statistics']) < 1e-6
    assert max(float(g.abs().max()) for g in one[mode]['gradients'].values()) > 1e-3 # there is something to compare

def test_the_loss_of_the_local_pairs_is_another_one(one, two):
    loss = sum(process['local']['loss'] for process in two) / 2
    assert abs(float(loss - one['eval']['loss'])) > 0.1
    assert difference(two[0]['local']['gradients'], one['eval']['gradients']) > 1e-3

def test_statistics_of_the_share_are_other_ones(one, two):
    assert difference(two[0]['not_reduced']['statistics'], one['train']['statistics']) > 1e-3
    assert difference(two[0]['not_reduced']['gradients'], one['train']['gradients']) > 1e-3
    assert difference(one['not_reduced']['gradients'], one['train']['gradients']) == 0 # alone it is the BatchNorm of PyTorch

def test_the_same_batches_in_the_same_order(one, two):
    shares = [process['run']['seen'] for process in two]
    assert len(one['run']['seen']) == len(shares[0]) == 3 * 32 // 8
    for whole, first, second in zip(one['run']['seen'], *shares):
        assert len(first) == len(second) == 4 and np.array_equal(whole, np.concatenate([first, second]))

def test_a_run_of_three_stages_has_the_weights_of_one_process(one, two):
    for process in two:
        assert difference(process['run']['weights'], one['run']['weights']) < 1e-6
        assert float((process['run']['test'] - one['run']['test']).abs().max()) < 1e-5 # stored in float32
        for a, b in zip(process['run']['history'], one['run']['history'], strict=True):
            assert a['val'] == b['val'] and a['loss'] == pytest.approx(b['loss'], abs=1e-6, nan_ok=True)
    first, second = (process['run']['weights'] for process in two)
    assert all(torch.equal(first[k], second[k]) for k in first)

def test_a_batch_that_cannot_be_divided_is_refused(two):
    assert all('batch_size=7 cannot be divided among 2 processes: set batch_size=6' in process['refused'] for process in two)

def test_names_of_weights_stay_and_all_batch_norms_are_reduced():
    model = DualEncoder.from_profile(get_profile('smoke'))
    before, weights = list(model.state_dict()), list(model.parameters())
    reduce_batch_norm(model)
    assert list(model.state_dict()) == before and all(a is b for a, b in zip(weights, model.parameters()))
    norms = [type(m) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert set(norms) == {here.ReducedBatchNorm} and len(norms) == sum(k.endswith('running_mean') for k in before)

# -- the command

def launch(*arguments, script=None, n=2, **env):
    "Run the command, or a script, in n processes of `accelerate launch`."
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(n), '--main_process_port', '0',
               '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no']
    command += [str(script)] if script else ['-m', 'test_distributed']
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=600, cwd=ROOT/'tests',
                          env=os.environ | dict(CMLF_DEVICE='cpu', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)) | env)

@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    return write_corpus(compose(get_profile('smoke', SMALL)), tmp_path_factory.mktemp('corpus'))

def train(manifest, out, *more):
    settings = [f'{k}={str(v).lower()}' for k, v in PLAIN.items()]
    return ['train', '--data', str(manifest), '--out', str(out), '--profile', 'smoke', '--system', '3cmlf', *more, *(w for s in settings for w in ('--set', s))]

def test_accelerate_launch_trains_one_run(manifest, tmp_path, monkeypatch):
    done = launch(*train(manifest, tmp_path/'two', '--json'))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"run"') == 1 # one process prints
    lines = [l for l in done.stderr.splitlines() if 'epoch 1/' in l]
    assert len(lines) == len(set(lines)) == 4 # of the baseline, and of three stages
    assert not list(tmp_path.rglob('*.partial')) and len(list(tmp_path.rglob('run.json'))) == 2
    monkeypatch.setenv('CMLF_DEVICE', 'cpu')
    assert run_command(train(manifest, tmp_path/'one')) == 0
    a, b = (pd.read_csv(tmp_path/name/'history.csv') for name in ('one', 'two'))
    assert np.allclose(a.loss, b.loss, atol=1e-3, equal_nan=True) and np.allclose(a.val, b.val, atol=5)
    assert a[['stage', 'epoch', 'audio_updates', 'text_updates']].equals(b[['stage', 'epoch', 'audio_updates', 'text_updates']])

KILL = '''
import os, signal
import cmlf.experiments, cmlf.training
from functools import partial
from cmlf.cli import main

one_epoch = cmlf.training.Trainer.one_epoch
def killed(self):
    if os.environ['RANK'] == '1' and self.epoch == 2: os.kill(os.getpid(), signal.SIGKILL)
    return one_epoch(self)

cmlf.training.Trainer.one_epoch = killed
cmlf.experiments.Trainer = partial(cmlf.training.Trainer, save_every=0)
main()
'''

def test_a_killed_process_ends_the_command_and_the_next_one_resumes(manifest, tmp_path, monkeypatch, capsys):
    (tmp_path/'kill.py').write_text(KILL)
    command = train(manifest, tmp_path/'run', '--system', 'baseline', '--set', 'epochs=4')
    killed = launch(*command, script=tmp_path/'kill.py')
    assert killed.returncode not in (0, 2) and 'epoch 1/4' in killed.stderr and 'epoch 4/4' not in killed.stderr
    assert not (tmp_path/'run'/'run.json').exists()
    monkeypatch.setenv('CMLF_DEVICE', 'cpu')
    assert run_command(command) == 0 # in one process
    lines = capsys.readouterr().err
    assert re.search(r'resumed after stage 1, epoch [12]', lines) and 'epoch 4/4' in lines
    assert pd.read_csv(tmp_path/'run'/'history.csv').epoch.tolist() == [0, 1, 2, 3, 4]

# -- refusals

@pytest.fixture
def second_process(monkeypatch):
    for name, value in dict(LOCAL_RANK='1', RANK='1', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1').items(): monkeypatch.setenv(name, value)
    waits = []
    monkeypatch.setattr(here.time, 'sleep', waits.append)
    return waits

def test_other_commands_are_refused_under_a_launcher(second_process, monkeypatch, capsys):
    for number in '10':
        monkeypatch.setenv('RANK', number)
        assert run_command(['reproduce', '--profile', 'smoke']) == 2
        assert 'only `cmlf train` shares its work among processes' in capsys.readouterr().err
    assert len(second_process) == 1 # the first process reports at once

def test_without_accelerate_the_extra_is_named(second_process, monkeypatch):
    monkeypatch.setattr(here, 'find_spec', lambda name: None)
    with pytest.raises(CmlfError, match=r"pip install 'cmlf\[devices\]'"), joined(): pass

def test_without_a_launcher_nothing_is_imported_or_changed(monkeypatch):
    for name in ('LOCAL_RANK', 'WORLD_SIZE'): monkeypatch.delenv(name, raising=False)
    code = ('import sys; from cmlf.appendix.distributed import *; import torch\n'
            'with joined(): x = torch.ones(2, 3); assert gather(x) is x and processes() == 1 and share_of(x, 2)[0] is x\n'
            'assert "accelerate" not in sys.modules')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert processes() == 1 and rank() == 0

if __name__ == '__main__': sys.exit(run_command())
