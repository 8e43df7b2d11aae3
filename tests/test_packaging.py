"Facts that are in several files agree: dependencies in three files, numbers in README and reports."
import ast, configparser, io, json, os, re, sys, tomllib
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

from cmlf.core import committed

ROOT = Path(__file__).parent.parent
project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']

def ini(key):
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT/'settings.ini')
    return sorted(parser['DEFAULT'][key].split())

def extras() -> dict: return project['optional-dependencies']

def every_requirement() -> list: return project['dependencies'] + sum(extras().values(), [])

def name_of(requirement): return re.split(r'[^\w.-]', requirement)[0].lower().replace('_', '-')

def pinned() -> dict:
    lines = [l.split(';')[0] for l in (ROOT/'constraints.txt').read_text().splitlines() if l and l[0] != '#']
    assert all(re.fullmatch(r'[\w.-]+==\S+', l.strip()) for l in lines)
    return {name_of(l): l.split('==')[1].strip() for l in lines}

def test_settings_ini_agrees_with_pyproject():
    assert ini('requirements') == sorted(project['dependencies'])
    for name, wanted in extras().items(): assert ini(f'{name}_requirements') == sorted(wanted)
    assert ini('console_scripts') == [f'{k}={v}' for k, v in project['scripts'].items()]

def test_a_library_asks_for_lower_bounds_and_constraints_hold_the_versions():
    assert not [r for r in every_requirement() if '==' in r]
    versions = pinned()
    for r in map(Requirement, every_requirement()): assert r.specifier.contains(versions[name_of(r.name)]), r

def test_installed_versions_are_the_tested_ones():
    if not os.environ.get('CI'): pytest.skip('developers may have other versions; only CI checks them')
    got = {name_of(r.name): version(r.name) for r in map(Requirement, project['dependencies'])}
    assert {n: v.split('+')[0] for n, v in got.items()} == {n: pinned()[n] for n in got}

def test_every_import_of_the_library_is_a_dependency():
    "Some packages have another import name (sklearn); extras are imported where they are used, with an error message."
    known = {name_of(r) for r in project['dependencies']} | {'sklearn', 'cmlf', 'jupyter-client', 'nbformat', 'ipython'}
    known |= {'h5py', 'pyarrow', 'gensim', 'distributed', 'accelerate', 'mteb', 'faiss', 'fastapi', 'starlette', 'uvicorn'} | {name_of(n) for n in sys.stdlib_module_names}
    for path in (ROOT/'cmlf').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            assert {name_of(n.split('.')[0]) for n in names} <= known, path.name

def test_a_module_defines_a_name_once():
    "Methods that `@patch` adds to different classes may have the same name."
    for path in (ROOT/'cmlf').rglob('*.py'):
        defined = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        names = [n.name for n in defined if 'patch' not in {getattr(getattr(d, 'func', d), 'id', '') for d in n.decorator_list}]
        assert sorted(names) == sorted(set(names)), path.name

def test_extras_are_imported_late():
    "`import cmlf.x` works without them."
    for path in (ROOT/'cmlf').rglob('*.py'):
        top = re.findall(r'^(?:import|from) (\w+)', path.read_text(), re.M)
        assert not {'h5py', 'pyarrow', 'gensim', 'distributed', 'nbdev', 'pytest', 'faiss', 'fastapi', 'starlette', 'uvicorn', 'mteb', 'sentence_transformers'} & set(top), path.name

def test_environment_yml_installs_the_package_with_the_tested_versions():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())['dependencies']
    constraints, package = next(d['pip'] for d in env if isinstance(d, dict))
    assert constraints == '-c constraints.txt'
    assert set(re.fullmatch(r'-e \.\[(.*)\]', package)[1].split(',')) == set(extras())
    assert f'python{project["requires-python"]}' in env

def test_pre_commit_uses_the_tested_ruff():
    hooks = yaml.safe_load((ROOT/'.pre-commit-config.yaml').read_text())['repos']
    asked = [d for repo in hooks for hook in repo['hooks'] for d in hook.get('additional_dependencies', [])]
    assert f'ruff=={pinned()["ruff"]}' in asked

def test_every_file_beside_the_modules_is_packaged():
    data = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['setuptools']['package-data']['cmlf']
    packaged = {p for pattern in data for p in (ROOT/'cmlf').glob(pattern) if p.is_file()}
    assert ROOT/'cmlf/py.typed' in packaged
    beside = {p for p in (ROOT/'cmlf').rglob('*') if p.is_file() and p.suffix not in ('.py', '.pyc')}
    assert beside == packaged

def test_version_is_one():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT/'settings.ini')
    import cmlf
    assert project['version'] == parser['DEFAULT']['version'] == cmlf.__version__

def at_head(path) -> str:
    """A file of the last commit. If a report or benchmark is run again, its file changes, but README need not change yet."""
    text = committed(ROOT/path)
    if text is None: pytest.skip(f'{path} is in no commit: not a checkout of the repository')
    return text

def at_head_csv(path): return pd.read_csv(io.StringIO(at_head(path)))

@pytest.mark.parametrize('profile', ['mini', 'field'])
def test_readme_shows_the_numbers_of_the_report(profile):
    readme, table = at_head('README.md'), at_head_csv(f'reports/{profile}/table1.csv')
    def number(row, name): # R@1 of several seeds with its standard deviation
        sd = f' ± {row[f"{name}_sd"]:.1f}' if name.endswith('_r1') and pd.notna(row.get(f'{name}_sd')) else ''
        return f'{row[name]:.1f}{sd}'
    for _, row in table.iterrows():
        cells = [' / '.join(number(row, f'{d}_r{k}') for k in (1, 5, 10)) for d in ('t2a', 'a2t')]
        columns = [row.system, row.audio_encoder, row.chm, *cells]
        assert f'| {" | ".join("" if pd.isna(t) else t for t in columns)} |' in readme
    assert f'pool `{table.pool[0]}`' in readme
    commit = json.loads(at_head(f'reports/{profile}/provenance.json'))['commit'].rstrip('+')
    assert f'commit {commit}' in readme

def cells_of(line): return [c.strip() for c in line.strip().strip('|').split('|')]

def tables_of(text):
    "(head, rows) of every table of a markdown page."
    for block in re.findall(r'(?:^\|.*\n)+', text, re.M):
        lines = [cells_of(l) for l in block.splitlines()]
        yield lines[0], [dict(zip(lines[0], l)) for l in lines[2:]]

@pytest.mark.parametrize('name', ['claims', 'variants', 'norms', 'ways', 'encoders'])
def test_readme_shows_rows_of_the_claims(name):
    head, rows = next(tables_of(at_head(f'reports/mini/{name}.md')))
    shown = [(h, r) for h, r in tables_of(at_head('README.md')) if h[0] == head[0] and set(h) <= set(head)]
    assert len(shown) == 1, f'README should have one table with columns of {name}.md: {head}'
    columns, lines = shown[0]
    assert lines and all(l in [{c: r[c] for c in columns} for r in rows] for l in lines)

@pytest.mark.parametrize('profile', ['mini', 'field'])
def test_committed_reports_hold_every_number_and_no_recording(profile):
    folder = f'reports/{profile}'
    for n in (1, 2, 3): assert at_head_csv(f'{folder}/table{n}.csv')[['t2a_r1', 'a2t_r10']].notna().all(axis=None)
    sounds = re.findall('data:audio', at_head(f'{folder}/index.html'))
    assert (len(sounds) >= 6) == (profile == 'mini')

def test_readme_shows_the_numbers_of_the_mining_benchmark():
    readme, runs = at_head('README.md'), at_head_csv('reports/benchmarks/mining.csv')
    rows = re.findall(r'^\| (?:\*\*)?([^|*]+?)(?:\*\*, `sweeps=(\d+)`[^|]*)? \| (0\.\d{4}) \| (\S+) \|$', readme, re.M)
    assert len(rows) >= 8
    for method, sweeps, cosine, seconds in rows:
        run = runs[(runs.method == method) & (runs.kind != 'easy') & (runs.sweeps == int(sweeps or 0))]
        assert len(run) == 1 and f'{run.cosine.iloc[0]:.4f}' == cosine, method
        assert seconds in ('–', f'{run.seconds.iloc[0]:.1f}'), method
    assert f'| *no batches can exceed* | {runs[runs.kind == "hard"].bound.iloc[0]:.4f} | |' in readme
    easy = runs[(runs.kind == 'easy') & (runs.method == 'cmlf') & (runs.sweeps == 2)].iloc[0]
    assert f'{easy.cosine:.4f} in {easy.seconds:.1f} s; none can go below {easy.bound:.4f}' in readme
