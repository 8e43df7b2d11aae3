"Helpers of the tests: run the `cmlf` command in a new process, start a browser."
import os, shutil, subprocess, sys, tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# a server that has imported everything: its children start at once, instead of after some seconds
context = get_context('forkserver')
context.set_forkserver_preload(['cmlf.cli', 'cmlf.experiments', 'cmlf.report', 'cmlf.search', 'cmlf.appendix.evaluation'])

def _call(arguments, cwd, env, out, err):
    for path, fd in ((os.devnull, 0), (out, 1), (err, 2)): os.dup2(os.open(path, os.O_RDWR), fd)
    os.chdir(cwd)
    os.environ.clear(); os.environ.update(env)
    sys.argv = ['cmlf', *arguments]
    from cmlf.cli import main
    main()

def cmlf(*arguments, cwd=ROOT, fresh=False, **env):
    "Run the command in a new process; the finished process with its output. `fresh`: one that imports everything itself."
    arguments = [*map(str, arguments)]
    if fresh: return subprocess.run([sys.executable, '-c', 'from cmlf.cli import main; main()', *arguments], cwd=cwd,
                                    capture_output=True, text=True, env={**os.environ, **env}, timeout=600)
    with tempfile.NamedTemporaryFile('r') as out, tempfile.NamedTemporaryFile('r') as err:
        process = context.Process(target=_call, args=(arguments, cwd, {**os.environ, **env}, out.name, err.name))
        process.start(); process.join(600)
        if process.is_alive(): process.kill(); raise subprocess.TimeoutExpired(arguments, 600)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read(), err.read())

def assert_refused(done, *words):
    "Check for exit code 2 and exactly one line on stderr, which contains all `words`."
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and 'Traceback' not in done.stderr
    for word in words: assert word in lines[0]

def chromium(profile) -> list:
    "The command of a headless Chromium with its own profile folder; the test is skipped without Chromium."
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not path: pytest.skip('no Chromium is installed')
    return [path, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-sync',
            '--disable-component-update', f'--user-data-dir={profile}']
