"Helpers of the tests: run the `cmlf` command in a new process."
import os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

def cmlf(*arguments, cwd=ROOT, **env):
    "Run the command in a new process; the finished process with its output."
    return subprocess.run([sys.executable, '-c', 'from cmlf.cli import main; main()', *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, **env}, timeout=600)

def assert_refused(done, *words):
    "Check for exit code 2 and exactly one line on stderr, which contains all `words`."
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and 'Traceback' not in done.stderr
    for word in words: assert word in lines[0]
