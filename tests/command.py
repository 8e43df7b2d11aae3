"Helpers of the tests: run the `cmlf` command in a new process, start a browser."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

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

def chromium(profile) -> list:
    "The command of a headless Chromium with its own profile folder; the test is skipped without Chromium."
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not path: pytest.skip('no Chromium is installed')
    return [path, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-sync',
            '--disable-component-update', f'--user-data-dir={profile}']
