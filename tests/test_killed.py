"Processes killed at random moments, also while they write; damaged files; two processes; a full disk. What is left has the same bits."
import json, os, random, re, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

import killing
from cmlf.appendix.resume import Checkpoint, newest_state, write_state
from cmlf.core import CmlfError
from command import cmlf, context
from killing import differences, left, run_killed, run_whole, start
from test_runs import SMALL, some_rows, tones

KILLS = int(os.environ.get('CMLF_KILLS', 4))  # of each kind of work

# --- killed at random moments

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "{work: (what is left without interruption, seconds)}, each computed once."
    found = {}
    def get(work):
        if work not in found:
            folder = tmp_path_factory.mktemp(work)
            seconds = run_whole(work, folder)
            found[work] = left(folder), seconds
        return found[work]
    return get

@pytest.mark.parametrize('work', killing.WORK)
def test_killed_at_random_moments(work, whole, tmp_path):
    "Each folder is killed once to four times, until there were enough kills."
    expected, seconds = whole(work)
    stream, killed, trial = random.Random(work), 0, 0
    while killed < KILLS:
        assert trial < 5 * KILLS, 'the work ends before it can be killed'
        folder = tmp_path/str(trial)
        n = run_killed(work, folder, seconds, min(1 + trial % 4, KILLS - killed), stream)
        killed += n
        if not n: seconds *= .7 # the machine has less to do than when the time was measured
        assert differences(expected, left(folder)) == []
        assert not list(folder.rglob('*.partial')) and not list(folder.rglob('checkpoint'))
        shutil.rmtree(folder); trial += 1

def test_nothing_is_the_same_by_accident(whole):
    "The comparison sees one changed bit."
    expected, _ = whole('feature_store')
    name, rows = next((n, v['rows'].copy()) for n, v in expected.items() if 'rows' in v)
    rows.view(np.uint16).flat[7] ^= 1
    assert differences(expected, expected | {name: dict(rows=rows)}) == [f'{name}: rows']

# --- killed at every step of one write

def _die_at(n, folder):
    "Write three states; SIGKILL before the n-th call that changes a name in the folder."
    calls = 0
    def dies(f):
        def g(*a, **kw):
            nonlocal calls
            calls += 1
            if calls == n: os.kill(os.getpid(), signal.SIGKILL)
            return f(*a, **kw)
        return g
    os.replace, os.unlink, Path.chmod = dies(os.replace), dies(os.unlink), dies(Path.chmod)
    for i in range(3, 6): write_state(folder, 'plan', dict(i=i, w=torch.full((99,), float(i))))

def test_killed_at_every_step_of_a_write(tmp_path):
    seen, n = set(), 0
    while True:
        n += 1; folder = tmp_path/str(n)
        for i in range(3): write_state(folder, 'plan', dict(i=i, w=torch.full((99,), float(i))))
        process = context.Process(target=_die_at, args=(n, folder))
        process.start(); process.join()
        plan, state = newest_state(folder, say=pytest.fail)
        assert plan == 'plan' and state['w'].eq(state['i']).all()
        seen.add(state['i'])
        assert Checkpoint(folder, 'plan').load('cpu')['i'] == state['i'] and not list(folder.glob('.*'))
        if process.exitcode == 0: break
        assert process.exitcode == -signal.SIGKILL
    assert seen == {2, 3, 4, 5} and n > 12

# --- damaged afterwards

@pytest.mark.parametrize('seed', range(12))
def test_a_damaged_state_is_set_aside(seed, tmp_path):
    "Bytes changed, cut off or added, in either file: the state before is used, and one line names the file."
    r, lines = random.Random(seed), []
    for i in range(3): write_state(tmp_path, 'plan', dict(i=i, w=torch.rand(50), text='ä"\\'))
    path = r.choice(sorted(tmp_path.glob('000003.*')))
    data = bytearray(path.read_bytes())
    how = ('flip', 'cut', 'empty', 'more')[seed % 4]
    if how == 'flip': data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    path.write_bytes(dict(flip=data, cut=data[:r.randrange(len(data))], empty=b'', more=data + b'}')[how])
    plan, state = newest_state(tmp_path, say=lines.append)
    assert state['i'] == 1 and len(lines) == 1 and path.name in lines[0] and '000003.*.damaged' in lines[0]
    write_state(tmp_path, 'plan', dict(i=3))
    assert newest_state(tmp_path, say=pytest.fail)[1]['i'] == 3 and list(tmp_path.glob('*.damaged'))

def test_a_missing_file_is_damage(tmp_path):
    for i in range(2): write_state(tmp_path, 'plan', dict(i=i, w=torch.rand(5)))
    (tmp_path/'000002.safetensors').unlink()
    assert newest_state(tmp_path)[1]['i'] == 0

def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    write_state(tmp_path, 'seed 0', dict(i=0))
    with pytest.raises(CmlfError, match='another run'): Checkpoint(tmp_path, 'seed 1').load('cpu')
    assert Checkpoint(tmp_path, 'seed 0').load('cpu') == dict(i=0)

# --- two processes on one folder

def test_two_processes_train_a_run_once(whole, tmp_path):
    expected, _ = whole('ce')
    both = [start('ce', tmp_path) for _ in range(2)]
    for p in both: p.join(); assert p.exitcode == 0
    assert differences(expected, left(tmp_path)) == [] and not list(tmp_path.rglob('*.partial'))

# --- a full disk

@pytest.fixture
def disk(tmp_path):
    "A disk of 6 MB."
    folder = tmp_path/'disk'; folder.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', str(folder)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'no small disk can be mounted here: {done.stderr.strip()}')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)

def fill(disk, leave):
    "Fill the disk up to `leave` bytes; returns the file to delete."
    path = disk/'filler'
    path.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - leave - 4096)))
    return path

def test_a_full_disk_leaves_the_checkpoint_before(disk):
    saved = Checkpoint(disk/'checkpoint', 'plan')
    saved.save(i=1, w=torch.rand(1000))
    filler = fill(disk, 20_000)
    with pytest.raises(CmlfError, match=r'checkpoint: the checkpoint cannot be written \(.*[Nn]o space left.*what was written before is valid'):
        saved.save(i=2, w=torch.rand(100_000))
    assert saved.load('cpu')['i'] == 1
    filler.unlink(); saved.save(i=3, w=torch.rand(100_000))
    assert saved.load('cpu')['i'] == 3

def refused(done):
    lines = [l for l in done.stderr.splitlines() if l.startswith('cmlf: ')]
    assert done.returncode == 2 and len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    return lines[0]

@pytest.mark.parametrize('leave', [20_000, 400_000, 1_500_000])
def test_training_on_a_full_disk_ends_with_one_line_and_goes_on(leave, disk, tmp_path):
    "The disk is full when features, checkpoints or the model are written."
    data = tones(tmp_path/'own', some_rows())
    command = 'train', '--data', data, *SMALL, '--system', 'baseline', '--out', disk/'run'
    filler = fill(disk, leave)
    assert re.search('no space left|the store needs', refused(cmlf(*command)))
    filler.unlink(); subprocess.run(['mount', '-o', 'remount,size=80m', str(disk)], check=True)
    done = cmlf(*command)
    assert done.returncode == 0 and (disk/'run'/'run.json').exists(), done.stderr

def test_indexing_on_a_full_disk_ends_with_one_line_and_goes_on(disk, tmp_path):
    pytest.importorskip('faiss', reason='searching needs the extra search')
    tones(tmp_path/'own', some_rows(2, 2, 2))
    command = 'index', tmp_path/'own', '--model', 'demo', '--out', disk/'index'
    filler = fill(disk, 20_000)
    assert 'disk is full' in refused(cmlf(*command))
    filler.unlink()
    assert cmlf(*command).returncode == 0 and json.loads(cmlf('search', disk/'index', 'a tone', '--json').stdout)

# --- same in, same out

def _train_some(folder, jobs):
    killing.prepare()
    exp = killing.experiment(folder)
    exp.train_all([exp.spec('3cmlf', 'scratch', True), exp.spec('ce')], jobs=jobs)

def test_the_same_bits_with_one_job_and_two(tmp_path):
    for jobs in (1, 2):
        process = context.Process(target=_train_some, args=(tmp_path/str(jobs), jobs))
        process.start(); process.join()
        assert process.exitcode == 0
    one, two = left(tmp_path/'1'), left(tmp_path/'2')
    assert len(one) > 20 and differences(one, two) == []

SCRIPT = '''
import sys
sys.path.insert(0, sys.argv[1])
import killing
killing.do('three_stages', sys.argv[2])
'''

def test_the_same_bits_in_fresh_processes(whole, tmp_path):
    "Another process, another seed of Python's hashes, another folder."
    subprocess.run([sys.executable, '-c', SCRIPT, str(Path(__file__).parent), str(tmp_path/'again')], check=True, capture_output=True,
                   env={**os.environ, 'PYTHONHASHSEED': '7'})
    expected, _ = whole('three_stages')
    assert differences(expected, left(tmp_path/'again')) == []
