"Files that tell the same thing tell it alike: dependencies in three of them, numbers in README and reports."
import configparser, io, json, re, tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cmlf.core import committed

ROOT = Path(__file__).parent.parent
project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']

def ini(key):
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT/'settings.ini')
    return sorted(parser['DEFAULT'][key].split())

def test_settings_ini_agrees_with_pyproject():
    assert ini('requirements') == sorted(project['dependencies'])
    extras = project['optional-dependencies']
    assert set(extras) == {'dev', 'lab', 'data'}
    for name, wanted in extras.items(): assert ini(f'{name}_requirements') == sorted(wanted)

def test_environment_yml_agrees_with_pyproject():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())['dependencies']
    pip = next(d['pip'] for d in env if isinstance(d, dict))
    wanted = project['dependencies'] + sum(project['optional-dependencies'].values(), [])
    assert sorted(p for p in pip if not p.startswith('-')) == sorted(wanted)
    assert 'python=3.11' in env

def test_version_is_one():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT/'settings.ini')
    import cmlf
    assert project['version'] == parser['DEFAULT']['version'] == cmlf.__version__

def at_head(path) -> str:
    """A file as the last commit holds it: whoever makes a report or a benchmark again replaces the file, and README is not wrong for it."""
    text = committed(ROOT/path)
    if text is None: pytest.skip(f'{path} is in no commit: not a checkout of the repository')
    return text

def at_head_csv(path): return pd.read_csv(io.StringIO(at_head(path)))

@pytest.mark.parametrize('profile', ['mini', 'field'])
def test_readme_shows_the_numbers_of_the_report(profile):
    readme, table = at_head('README.md'), at_head_csv(f'reports/{profile}/table1.csv')
    for _, row in table.iterrows():
        cells = [' / '.join(f'{row[f"{d}_r{k}"]:.1f}' for k in (1, 5, 10)) for d in ('t2a', 'a2t')]
        told = [row.system, row.audio_encoder, row.chm, *cells]
        assert f'| {" | ".join("" if pd.isna(t) else t for t in told)} |' in readme
    assert f'pool `{table.pool[0]}`' in readme
    commit = json.loads(at_head(f'reports/{profile}/provenance.json'))['commit'].rstrip('+')
    assert f'commit {commit}' in readme

@pytest.mark.parametrize('profile', ['mini', 'field'])
def test_committed_reports_hold_every_number_and_no_recording(profile):
    folder = f'reports/{profile}'
    for n in (1, 2, 3): assert at_head_csv(f'{folder}/table{n}.csv')[['t2a_r1', 'a2t_r10']].notna().all(axis=None)
    sounds = re.findall('data:audio', at_head(f'{folder}/index.html'))
    assert (len(sounds) >= 6) == (profile == 'mini')

def test_readme_shows_the_numbers_of_the_mining_benchmark():
    readme, runs = at_head('README.md'), at_head_csv('reports/benchmarks/mining.csv')
    told = re.findall(r'^\| (?:\*\*)?([^|*]+?)(?:\*\*, `sweeps=(\d+)`[^|]*)? \| (0\.\d{4}) \| (\S+) \|$', readme, re.M)
    assert len(told) >= 8
    for method, sweeps, cosine, seconds in told:
        run = runs[(runs.method == method) & (runs.kind != 'easy') & (runs.sweeps == int(sweeps or 0))]
        assert len(run) == 1 and f'{run.cosine.iloc[0]:.4f}' == cosine, method
        assert seconds in ('–', f'{run.seconds.iloc[0]:.1f}'), method
    assert f'| *no batches can exceed* | {runs[runs.kind == "hard"].bound.iloc[0]:.4f} | |' in readme
    easy = runs[(runs.kind == 'easy') & (runs.method == 'cmlf') & (runs.sweeps == 2)].iloc[0]
    assert f'{easy.cosine:.4f} in {easy.seconds:.1f} s; none can go below {easy.bound:.4f}' in readme
