"Runs in several processes and on a dask cluster: processes that are killed, two commands at once, clusters that cannot be used."
import os, re, signal, subprocess, sys, threading, time
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from cmlf import runs as runs_module
from cmlf.appendix import executors
from cmlf.appendix.executors import DaskExecutor, gpu_environment
from cmlf.cli import run_command
from cmlf.config import get_profile
from cmlf.core import CmlfError
from cmlf.experiments import Experiment
from cmlf.runs import is_done
from command import ROOT, cmlf
from counting import STEPS, Counting, written

pytest.importorskip('distributed')
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='/proc is needed')

def start(log, module, *arguments):
    "A scheduler or worker of dask, in the folder of its log; it can import the stores of these tests."
    env = os.environ | dict(PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT/"tests"}', CMLF_DEVICE='cpu')
    log.parent.mkdir(exist_ok=True)
    with open(log, 'w') as f:
        return subprocess.Popen([sys.executable, '-m', f'distributed.cli.dask_{module}', '--no-dashboard', '--host', '127.0.0.1',
                                 *map(str, arguments)], cwd=log.parent, env=env, stdout=f, stderr=f)

def start_scheduler(folder):
    process = start(folder/'scheduler'/'log', 'scheduler', '--port', 0)
    return process, wait_until(lambda: re.search(r'Scheduler at: +(tcp://127.0.0.1:\d+)', (folder/'scheduler'/'log').read_text()))[1]

def start_worker(folder, address):
    threads = max(1, os.cpu_count() // 2) # as many as with two local processes, so that sums have the same order
    return start(folder/uuid4().hex/'log', 'worker', address, '--no-nanny', '--nthreads', threads, '--resources', 'run=1', '--memory-limit', 0)

def end(*processes):
    for p in processes: p.kill(); p.wait(20)

@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "A scheduler with two workers on this machine; (address, workers)."
    folder = tmp_path_factory.mktemp('cluster')
    scheduler, address = start_scheduler(folder)
    workers = [start_worker(folder, address) for _ in range(2)]
    try: yield address, workers
    finally: end(*workers, scheduler)

def store_of(folder, **settings): return Counting(get_profile('smoke').replace(**settings), folder)

def table_of(store):
    "Six runs, some after others."
    mined = store.spec('3cmlf', 'pretrained', chm=True)
    return [*store.parents(mined), mined, store.spec('experts'), store.spec('ce'), store.spec('baseline', 'scratch')]

def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, 'it did not happen in time'
        time.sleep(.02)
    return found

def kill_one(folder, among=None) -> str:
    "Kill the process of a run that has done some of its steps; the name of the run."
    def begun(): # a run with a checkpoint
        ended = {name for name, in written(folder, 'end')}
        return [(name, int(pid)) for name, pid, _ in written(folder, 'start') if name not in ended and (among is None or int(pid) in among)
                and any(int(f.read_text()) > 2 for f in folder.glob(f'smoke/{name}*.partial/checkpoint/step.txt'))]
    name, pid = wait_until(begun)[0]
    os.kill(pid, signal.SIGKILL)
    return name

def train(store, specs, **options) -> threading.Thread:
    "Train in a thread; `thread.error` is what it raised."
    def call():
        try: store.train_all(specs, **options)
        except BaseException as e: thread.error = e
    thread = threading.Thread(target=call); thread.error = None
    thread.start()
    return thread

def assert_whole(store, specs, killed=''):
    "Every run is stored whole, and was started once; the killed one twice, the second time from its checkpoint."
    for s in specs:
        files = sorted(f.name for f in store.run_folder(s).iterdir())
        assert files == ['number.txt', 'run.json'] and (store.run_folder(s)/'number.txt').read_text() == s.name
        starts = [int(first) for name, _, first in written(store.runs, 'start') if name == s.name]
        assert len(starts) == 1 + (s.name == killed), (s.name, starts)
        if s.name == killed: assert 0 < starts[1] < STEPS
    assert not list(store.runs.rglob('*.partial')) and not list(store.runs.glob('.probe*'))

# --- processes that are killed

def test_a_killed_local_process_costs_its_run_some_time_and_nothing_else(tmp_path):
    store = store_of(tmp_path)
    thread = train(store, table_of(store), jobs=2)
    killed = kill_one(tmp_path)
    thread.join(60)
    assert thread.error is None
    assert_whole(store, table_of(store), killed)

def test_a_killed_worker_costs_its_run_some_time_and_nothing_else(cluster, tmp_path):
    address, workers = cluster
    store = store_of(tmp_path)
    thread = train(store, table_of(store), cluster=address)
    killed = kill_one(tmp_path, {w.pid for w in workers})
    dead = wait_until(
        lambda: next((w for w in workers if w.poll() is not None), None))
    thread.join(60)
    assert thread.error is None
    assert_whole(store, table_of(store), killed)
    workers[workers.index(dead)] = start_worker(tmp_path, address) # for the other tests

@LINUX
def test_ctrl_c_ends_the_local_processes(tmp_path):
    (tmp_path/'main.py').write_text( # a shell starts its background commands with SIGINT ignored
        'import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom cmlf.config import get_profile\nfrom counting import Counting\n'
        'if __name__ == "__main__":\n    s = Counting(get_profile("smoke"), sys.argv[1])\n    s.train_all([s.spec("experts"), s.spec("tagger")], jobs=2)')
    process = subprocess.Popen([sys.executable, tmp_path/'main.py', tmp_path], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | dict(PYTHONPATH=str(ROOT/'tests')))
    wait_until(lambda: len(written(tmp_path, 'start')) == 2)
    os.killpg(process.pid, signal.SIGINT) # as a terminal does
    assert process.wait(20) and 'KeyboardInterrupt' in process.stderr.read()
    assert not [pid for _, pid, _ in written(tmp_path, 'start') if Path(f'/proc/{pid}').exists()]
    assert not [f for f in tmp_path.rglob('run.json')]

# --- the same results

def test_a_cluster_gives_the_same_bits_as_local_processes(cluster, tmp_path):
    "A baseline, and a run that mines batches from its embeddings."
    profile = get_profile('smoke').replace(n_train=24, n_val=8, n_test=8, seconds=1., epochs=3)
    found = []
    for folder, options in (('local', dict(jobs=2)), ('cluster', dict(cluster=cluster[0]))):
        exp = Experiment(profile, tmp_path/folder)
        spec = exp.spec('3cmlf', 'scratch', chm=True)
        exp.train_all([*exp.parents(spec), spec], **options)
        found.append([exp.run(s) for s in (*exp.parents(spec), spec)])
    for a, b in zip(*found):
        assert (a.folder/'model.safetensors').read_bytes() == (b.folder/'model.safetensors').read_bytes(), a.folder.name
        assert all(np.array_equal(a.arrays[k], b.arrays[k]) for k in a.arrays)
        assert a.metadata['machine']['threads'] == b.metadata['machine']['threads']

# --- several commands and machines

def test_two_commands_on_one_cluster_share_their_runs(cluster, tmp_path):
    stores = [store_of(tmp_path) for _ in range(2)]
    threads = [train(s, table_of(s), cluster=cluster[0]) for s in stores]
    for t in threads: t.join(60); assert t.error is None
    assert_whole(stores[0], table_of(stores[0]))

def test_without_working_locks_two_processes_end_with_one_whole_run(tmp_path, monkeypatch):
    class NoLock:
        def __init__(self, path): pass
        def __enter__(self): return self
        def __exit__(self, *error): pass
    monkeypatch.setattr(runs_module, 'FileLock', NoLock)
    stores = [store_of(tmp_path) for _ in range(2)]
    spec = stores[0].spec('experts')
    threads = [train(s, [spec]) for s in stores]
    for t in threads: t.join(30); assert t.error is None
    assert len(written(tmp_path, 'start')) == 2
    assert sorted(f.name for f in stores[0].run_folder(spec).iterdir()) == ['number.txt', 'run.json']
    assert not list(tmp_path.rglob('*.partial'))

def test_a_run_resumes_from_the_newest_of_several_attempts(tmp_path):
    store = store_of(tmp_path)
    spec = store.spec('experts')
    done = store.run_folder(spec)
    for age, (name, step) in enumerate([('', 3), ('.aa', 9), ('.bb', 5)]): # '': the name that folders had before
        folder = done.with_name(f'{done.name}{name}.partial')
        (folder/'checkpoint').mkdir(parents=True)
        (folder/'checkpoint'/'step.txt').write_text(str(step))
        os.utime(folder/'checkpoint'/'step.txt', (1000 + age, 1000 + age))
    store.run(spec)
    assert written(tmp_path, 'start')[0][2] == '5' and not list(tmp_path.rglob('*.partial'))

@LINUX
def test_a_worker_that_sees_another_folder_is_named(cluster, tmp_path, monkeypatch):
    "/proc/self/cwd is another folder for every process."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CmlfError, match=r'worker tcp://127.0.0.1:\d+ does not see the folder of runs /proc/self/cwd'):
        with DaskExecutor(cluster[0], '/proc/self/cwd'): pass

def test_a_worker_with_other_code_is_named(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, 'CODE', 'other')
    with pytest.raises(CmlfError, match=r'worker tcp://\S+ runs other code of cmlf'): store_of(tmp_path).train_all([store_of(tmp_path).spec('ce')], cluster=cluster[0])

def test_a_worker_that_would_train_two_runs_in_one_process_is_named(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(DaskExecutor, 'workers', lambda self: {'tcp://10.0.0.1:1': dict(nthreads=2, resources={})})
    with pytest.raises(CmlfError, match='worker tcp://10.0.0.1:1 would train 2 runs in one process.*--nthreads 1'):
        with DaskExecutor(cluster[0], tmp_path): pass

def test_other_data_on_a_worker_is_an_error_and_not_another_run(cluster, tmp_path, monkeypatch):
    store = store_of(tmp_path)
    monkeypatch.setattr(Counting, 'corpus_hash', 'other numbers') # only in this process
    with pytest.raises(CmlfError, match='experts.* reads other data'): store.train_all([store.spec('experts')], cluster=cluster[0])
    assert not list(tmp_path.rglob('run.json'))

def test_a_failed_run_costs_only_the_runs_that_need_it(cluster, tmp_path):
    "The experts' folder cannot be made; ce needs them, nothing else does."
    store = store_of(tmp_path)
    bad = store.run_folder(store.spec('experts'))
    bad.mkdir(parents=True); (bad/'in the way').touch()
    with pytest.raises(OSError) as e: store.train_all(table_of(store), cluster=cluster[0])
    assert 'experts' in e.value.__notes__[0] and 'not started, because they need it: smoke ce-' in e.value.__notes__[0]
    assert [is_done(store, s) for s in table_of(store)] == [s.system not in ('ce', 'experts') for s in table_of(store)]

def test_a_lost_scheduler_is_one_error(tmp_path):
    scheduler, address = start_scheduler(tmp_path)
    worker = start_worker(tmp_path, address)
    try:
        store = store_of(tmp_path)
        thread = train(store, table_of(store), cluster=address)
        wait_until(lambda: written(tmp_path, 'start'))
        end(scheduler)
        thread.join(60)
        assert isinstance(thread.error, CmlfError) and f'scheduler at {address} is lost' in str(thread.error)
    finally: end(worker, scheduler)

# --- options of the command

def test_without_a_scheduler_the_command_ends_with_one_line(tmp_path):
    done = cmlf('reproduce', '--profile', 'smoke', '--tables', '2', '--runs', tmp_path, '--out', tmp_path/'report', '--cluster', 'tcp://127.0.0.1:9')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    lines = [l for l in done.stderr.strip().splitlines() if 'runs are needed' not in l]
    assert len(lines) == 1 and lines[0].startswith('cmlf: no dask scheduler answers at tcp://127.0.0.1:9'), done.stderr

@pytest.mark.parametrize('options, words', [(['--cluster', 'local:none'], ['local:none', 'local:N']),
                                            (['--cluster', 'local:2', '--jobs', '2'], ['either jobs or cluster'])])
def test_options_that_cannot_be_used_are_one_line(options, words, tmp_path, capsys):
    assert run_command(['reproduce', '--profile', 'smoke', '--runs', str(tmp_path), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(w in lines[0] for w in words), lines

def test_without_dask_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(executors, 'find_spec', lambda name: None)
    with pytest.raises(CmlfError, match=r"--cluster needs: pip install 'cmlf\[cluster\]'"): executors.check_address('local:2')

# --- one GPU per process

def test_every_local_process_sees_one_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(executors.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(executors.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.delenv('CMLF_DEVICE', raising=False)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,GPU-7')
    monkeypatch.setattr(executors, 'prefers_bf16', lambda: False)
    with executors.LocalExecutor(2) as executor:
        for place in range(2): assert executor.pools[place].submit(os.getenv, 'CUDA_VISIBLE_DEVICES').result() == ['3', 'GPU-7'][place]
    assert gpu_environment(2) == dict(CUDA_VISIBLE_DEVICES='3')
