"The three files that name our dependencies name the same ones."
import configparser, tomllib
from pathlib import Path

import yaml

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
