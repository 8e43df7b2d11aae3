"""Are there known vulnerabilities in the versions of constraints.txt?

    python tools/audit.py            ask pip-audit, if it is installed; it needs a network
    python tools/audit.py DATABASE   compare with a copy of an advisory database, without network: a folder or a .zip, such as
                                     https://github.com/pypa/advisory-database (YAML) or PyPI/all.zip of https://osv.dev (JSON)

Exit codes: 0 every package was checked, and none is affected; 1 some are affected, or cannot be told; 2 wrong arguments; 3 not checked.
"""
import argparse, importlib.util, json, shutil, subprocess, sys, zipfile
from pathlib import Path

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from dependencies import pinned, version_of

ROOT = Path(__file__).resolve().parent.parent
AFFECTED, NOT_CHECKED = 1, 3
ENDINGS = '.yaml', '.yml', '.json'

def stop(line): # the question is not answered
    print(f'not checked: {line}', file=sys.stderr)
    sys.exit(NOT_CHECKED)

# --- reading a database: texts only, nothing is unpacked ---

def texts(database:Path):
    "(name, function that reads it) of every file that may be an advisory."
    if database.is_dir():
        for p in sorted(database.rglob('*')):
            if p.suffix in ENDINGS and p.is_file(): yield p.relative_to(database).as_posix(), p.read_bytes
    elif zipfile.is_zipfile(database):
        z = zipfile.ZipFile(database)
        for name in sorted(z.namelist()):
            if name.endswith(ENDINGS): yield name, lambda name=name: z.read(name)
    else: stop(f'{database}: neither a folder nor a zip of advisories')

def _other_package(name, pins) -> bool: # vulns/PACKAGE/PYSEC-*.yaml says in its path what it is about
    parts = name.split('/')
    return 'vulns' in parts[:-2] and canonicalize_name(parts[parts.index('vulns') + 1]) not in pins

def advisories(database, pins) -> tuple:
    "Advisories about PyPI packages, and the number of files that may be some; an unreadable one is an error."
    found, n = [], 0
    for name, read in texts(Path(database)):
        if _other_package(name, pins): n += 1; continue
        try: advisory = json.loads(read()) if name.endswith('.json') else yaml.safe_load(read())
        except Exception as e: stop(f'{name}: not readable ({" ".join(str(e).split())[:100]})')
        if not isinstance(advisory, dict) or 'id' not in advisory or 'affected' not in advisory:
            if name.split('/')[-1].startswith(('PYSEC-', 'GHSA-', 'OSV-', 'MAL-')) and not (isinstance(advisory, dict) and advisory.get('withdrawn')):
                stop(f'{name}: no advisory of the OSV format')
            continue  # another file of the repository
        found.append(advisory); n += 1
    if not n: stop(f'{database}: holds no advisories; give the folder or zip of an advisory database')
    return found, n

# --- the OSV format: a version is affected if it is listed, or inside a range ---

def in_range(version:Version, events:list) -> bool:
    "Whether a version lies between `introduced` and `fixed` (or after, not beyond `last_affected`)."
    at = lambda text: Version('0.dev0') if str(text) == '0' else Version(str(text))
    order = dict(introduced=0, fixed=1, last_affected=2)
    points = sorted((at(v), order[k], k) for e in events for k, v in e.items() if k in order)
    inside = False
    for point, _, kind in points:
        if kind == 'introduced' and version >= point: inside = True
        if kind == 'fixed' and version >= point: inside = False
        if kind == 'last_affected' and version > point: inside = False
    return inside

def verdict(version:str, affected:dict) -> bool|None:
    "Whether one entry of `affected` covers a version; None: it cannot be told from version numbers."
    listed = list(map(str, affected.get('versions') or []))
    if version in listed: return True
    ranges = [r for r in affected.get('ranges') or [] if r.get('type') in ('ECOSYSTEM', 'SEMVER')]
    try:
        v = Version(version)
        if any(v == Version(x) for x in listed if _is_version(x)) or any(in_range(v, r.get('events') or []) for r in ranges): return True
    except (InvalidVersion, TypeError, AttributeError): return None
    return False if ranges or listed else None

def _is_version(text):
    try: return bool(Version(text))
    except InvalidVersion: return False

def fixes(affected) -> str:
    found = [str(e['fixed']) for r in affected.get('ranges') or [] if r.get('type') in ('ECOSYSTEM', 'SEMVER') for e in r.get('events') or [] if 'fixed' in e]
    return f'fixed in {", ".join(found)}' if found else 'no fixed version is named'

def compare(pins:dict, found:list) -> list:
    "A line for each advisory that covers a pinned version, or may cover it."
    lines = set()
    for advisory in found:
        if advisory.get('withdrawn'): continue
        for a in advisory['affected'] or []:
            package = a.get('package') or {}
            name = canonicalize_name(str(package.get('name', '')))
            if package.get('ecosystem') != 'PyPI' or name not in pins: continue
            version = version_of(pins[name])
            if (hit := verdict(version, a)) is False: continue
            names = ', '.join([str(advisory['id']), *map(str, advisory.get('aliases') or [])])
            lines.add(f'{name} {version}: {names}: ' + (fixes(a) if hit else 'cannot be told, the advisory names no versions that can be compared'))
    return sorted(lines)

def by_database(database, pins) -> list:
    if not Path(database).exists(): stop(f'{database}: no such folder or file')
    found, n = advisories(database, pins)
    newest = max((str(a.get('modified', '')) for a in found), default='')[:10]
    print(f'{len(pins)} packages, {n} advisories' + (f', the last change to those that were read is of {newest}' if newest else ''))
    return compare(pins, found)

# --- pip-audit ---

def command() -> list:
    if importlib.util.find_spec('pip_audit'): return [sys.executable, '-m', 'pip_audit']
    return [p] if (p := shutil.which('pip-audit')) else []

def by_pip_audit(constraints, pins) -> list:
    if not (program := command()):
        stop('pip-audit is not installed, and no advisory database was given: pip install pip-audit, or python tools/audit.py DATABASE')
    done = subprocess.run([*program, '-r', str(constraints), '--no-deps', '--disable-pip', '--progress-spinner', 'off', '-f', 'json'], capture_output=True, text=True)
    try: found = json.loads(done.stdout)['dependencies']
    except (ValueError, KeyError, TypeError): stop(f'pip-audit failed: {(done.stderr.strip().splitlines() or ["no output"])[-1]}')
    lines = [f'{d["name"]} {d["version"]}: {", ".join([v["id"], *v.get("aliases", [])])}: fixed in {", ".join(v["fix_versions"]) or "no version yet"}'
             for d in found for v in d.get('vulns', [])]
    # pip-audit ends with code 0 and "No known vulnerabilities found" if it could not look packages up
    checked = {canonicalize_name(d['name']) for d in found if 'skip_reason' not in d}
    left = sorted(n for n, r in pins.items() if n not in checked and (not r.marker or r.marker.evaluate()))
    if left and not lines: stop(f'pip-audit skipped {len(left)} of {len(pins)} packages, such as {left[0]}')
    if left: print(f'not checked: {len(left)} packages, such as {left[0]}', file=sys.stderr)
    print(f'{len(checked)} packages, by pip-audit')
    return lines

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('database', nargs='?', help='folder or zip of an advisory database')
    parser.add_argument('--constraints', type=Path, default=ROOT/'constraints.txt')
    args = parser.parse_args()
    pins = pinned(args.constraints)
    lines = by_database(args.database, pins) if args.database else by_pip_audit(args.constraints, pins)
    print('\n'.join(lines) if lines else 'none is affected by a known vulnerability')
    sys.exit(AFFECTED if lines else 0)

if __name__ == '__main__': main()
