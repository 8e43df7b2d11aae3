"""Write docs/dependencies.md: every package of constraints.txt with its licence, and why it is there.

    python tools/dependencies.py          write the page (`make dependencies`)
    python tools/dependencies.py --check  write nothing; exit code 1 if the page is not in step with constraints.txt and pyproject.toml

Licences and requirements are those of the installed packages. pip is asked for the metadata of packages that are not installed, such as
those of another Python; it installs nothing.
"""
import argparse, json, re, subprocess, sys, tempfile, tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT/'docs'/'dependencies.md'
CORE = 'cmlf'  # the group of what is always installed
PYTHONS = '3.11.9', '3.13.9'  # markers are read for these
COPYLEFT = re.compile(r'\b([AL]?GPL|MPL|EPL|EUPL|CDDL)|General Public|Mozilla', re.I)

# --- what is asked for ---

def pinned(path=ROOT/'constraints.txt') -> dict:
    "{canonical name: requirement} of constraints.txt."
    lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip() and line[0] != '#']
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}

def version_of(r) -> str: return next(iter(r.specifier)).version

def wanted(path=ROOT/'pyproject.toml') -> dict:
    "{group: requirements}: of the library itself, and of each extra."
    project = tomllib.loads(path.read_text(encoding='utf-8'))['project']
    groups = {CORE: project['dependencies']} | project['optional-dependencies']
    return {g: [Requirement(r) for r in found] for g, found in groups.items()}

# --- what packages say of themselves ---

def licence(fields:dict) -> str:
    "The licence in a package's metadata: its SPDX expression, a short text, or its classifiers."
    if fields.get('license_expression'): return fields['license_expression'].strip()
    text = (fields.get('license') or '').strip()
    if text and '\n' not in text and len(text) <= 60 and text.upper() != 'UNKNOWN': return text
    named = [c.split(' :: ')[-1] for c in fields.get('classifier') or [] if c.startswith('License :: ')]
    return ' / '.join(named) or (' '.join(text.split())[:60] if text.upper() != 'UNKNOWN' else '') or 'not stated'

def installed(requirement) -> dict|None:
    "The metadata of an installed package, if it has the pinned version."
    try: found = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError: return None
    if found.version.split('+')[0] != version_of(requirement): return None
    m = found.metadata
    return dict(license_expression=m.get('License-Expression'), license=m.get('License'), classifier=m.get_all('Classifier', []), requires_dist=found.requires or [])

def asked_of_pip(requirements, python) -> dict:
    "{canonical name: metadata} from the index, for one Python; nothing is installed."
    if not requirements: return {}
    with tempfile.TemporaryDirectory() as nowhere: # pip asks for a folder when it is told another Python
        command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--dry-run', '--ignore-installed', '--no-deps', '--only-binary=:all:', '--ignore-requires-python',
                   '--target', nowhere, '--python-version', python, '--report', '-', *(f'{r.name}{r.specifier}' for r in requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: sys.exit(f'pip has no metadata of the {len(requirements)} packages that are not installed: {done.stderr.strip().splitlines()[-1]}')
    found = json.loads(done.stdout)
    if Version(found['pip_version']) < Version('25.1'): sys.exit(f"pip {found['pip_version']} leaves licences out of its reports: pip install -U 'pip>=25.1'")
    return {canonicalize_name(i['metadata']['name']): i['metadata'] for i in found['install']}

def facts(pins) -> dict:
    "{canonical name: metadata} of all packages."
    found = {n: installed(r) for n, r in pins.items()}
    for python, of in zip(PYTHONS, (lambda r: not r.marker, lambda r: r.marker)):
        found |= asked_of_pip([r for n, r in pins.items() if not found[n] and of(r)], python)
    return found

# --- why a package is there ---

def requires(fields, extras) -> list:
    "What a package needs, with these extras of its own, on any of the Pythons."
    envs = [dict(python_version=p.rsplit('.', 1)[0], python_full_version=p, sys_platform='linux', platform_system='Linux', os_name='posix', extra=e)
            for p in PYTHONS for e in ('', *extras)]
    needed = map(Requirement, fields.get('requires_dist') or [])
    return [r for r in needed if not r.marker or any(r.marker.evaluate(e) for e in envs)]

def reached(roots, found) -> dict:
    "{canonical name: the package that needs it, '' for a root}, the shortest way first."
    parents, queue = {}, [(r, '') for r in roots]
    seen = set()
    while queue:
        r, parent = queue.pop(0)
        name = canonicalize_name(r.name)
        if name not in found: continue  # only for another system
        parents.setdefault(name, parent)
        if (key := (name, *sorted(r.extras))) in seen: continue
        seen.add(key)
        queue += [(s, name) for s in requires(found[name], r.extras)]
    return parents

def reasons(groups, found) -> dict:
    "{canonical name: (groups that need it, what it is needed through)}; `cmlf` alone, if the library always needs it."
    why = {}
    for group, roots in groups.items():
        for name, parent in reached(roots, found).items():
            needed, through = why.setdefault(name, ([], []))
            if CORE in needed and parent: continue
            needed.append(group)
            through.append(parent or 'direct')
    return why

# --- the page ---

HEAD = '''# Dependencies and their licences

Every package of `constraints.txt`, with the licence that it states itself. `make dependencies` writes this page.

*needed by* is `cmlf` for what is always installed, else the extras that need the package. *through* is `direct` if `pyproject.toml`
names it, else the package that asks for it.

'''

def rows(pins, found, why) -> list:
    dash = ([], [])
    def row(name, r):
        needed, through = why.get(name, dash)
        return [r.name + (f' ({r.marker})' if r.marker else ''), version_of(r), licence(found[name]), ', '.join(needed) or '–', ', '.join(dict.fromkeys(through)) or '–']
    return [row(n, r) for n, r in sorted(pins.items())]

def page(table) -> str:
    kept = [r for r in table if COPYLEFT.search(r[2])]
    lines = ''.join(f'- {r[0]}: {r[2]}\n' for r in kept)
    text = HEAD + f'{len(table)} packages. Those with a licence that asks for more than a notice, such as LGPL and MPL:\n\n{lines}\n'
    cell = lambda t: t.replace('|', '\\|').replace('<', '&lt;')
    return text + '| package | version | licence | needed by | through |\n|---|---|---|---|---|\n' + ''.join(f'| {" | ".join(map(cell, r))} |\n' for r in table)

def read(text) -> dict:
    "{canonical name: row} of a page."
    found = [[c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]] for line in text.splitlines() if line.startswith('| ')][1:]
    return {canonicalize_name(r[0].split(' (')[0]): r for r in found}

def faults(text, pins, groups) -> list:
    "Where a page is not in step with constraints.txt, pyproject.toml and the packages that are installed."
    listed, lines = read(text), []
    for name, r in pins.items():
        if name not in listed: lines.append(f'{r.name} is missing'); continue
        if listed[name][1] != version_of(r): lines.append(f'{r.name} {listed[name][1]} should be {version_of(r)}')
        elif (now := installed(r)) and listed[name][2] != licence(now).replace('|', '\\|'):
            lines.append(f'{r.name}: licence {listed[name][2]!r} should be {licence(now)!r}')
        direct = [g for g, found in groups.items() if name in {canonicalize_name(x.name) for x in found}]
        said = listed[name][3].split(', ') if 'direct' in listed[name][4] else []
        if not set(direct) <= set(said) or bool(direct) != bool(said): lines.append(f'{r.name}: should be direct in {direct}, stands there for {said}')
    return lines + [f'{name} is not in constraints.txt' for name in listed if name not in pins]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    pins, groups = pinned(), wanted()
    if parser.parse_args().check:
        lines = faults(PAGE.read_text(encoding='utf-8'), pins, groups) if PAGE.exists() else ['there is no page']
        if lines: sys.exit(f'{PAGE.relative_to(ROOT)}: ' + '; '.join(lines) + ': run make dependencies')
        return
    found = facts(pins)
    table = rows(pins, found, reasons(groups, found))
    PAGE.write_text(page(table), encoding='utf-8')
    print(f'{PAGE.relative_to(ROOT)}: {len(table)} packages, {sum(r[2] == "not stated" for r in table)} state no licence')

if __name__ == '__main__': main()
