"""What several benchmarks use: measurements in new processes, peak memory, a BERT-base with random weights."""
import json, os, resource, subprocess, sys
from pathlib import Path

import torch

from cmlf.appendix.bert import packaged_minilm, quiet
from cmlf.core import CmlfError, device

def threads_of(n) -> dict:
    "The environment variables that give a new process `n` threads."
    return dict.fromkeys('OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS'.split(), str(n))

def run_job(script, name, settings, env=None):
    "The result of job `name` of a benchmark in a new process; `settings` and the result are JSON values."
    command = [sys.executable, script, '--job', json.dumps([name, settings])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}))
    if done.returncode: raise CmlfError(f'job {name} {settings} failed; its message is above')
    return json.loads(done.stdout.splitlines()[-1])

def answer(text, jobs):
    "What the new process does: call the job, and print its result."
    name, settings = json.loads(text)
    print('\n' + json.dumps(jobs[name](**settings), default=float))

def peak_gb():
    "Peak memory of this process in GB; on a GPU, of the GPU."
    if device().type == 'cuda': return torch.cuda.max_memory_allocated() / 2**30
    status = Path('/proc/self/status') # getrusage would include memory of the parent process
    if not status.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = status.read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith('VmHWM')) / 2**20

def random_bert(folder):
    "A BERT-base with random weights and the packaged vocabulary, saved in `folder`."
    from transformers import AutoTokenizer, BertConfig, BertModel
    if not (Path(folder)/'model.safetensors').exists():
        with quiet():
            AutoTokenizer.from_pretrained(packaged_minilm()).save_pretrained(folder)
            BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(folder)
    return str(folder)
