"docs/dependencies.md is in step with constraints.txt; tools/audit.py finds what advisories name, and never takes silence for an answer."
import json, re, shutil, subprocess, sys, zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from command import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import audit, dependencies

# --- the page

PAGE = (ROOT/'docs'/'dependencies.md').read_text()

def test_the_page_is_in_step():
    assert dependencies.faults(PAGE, dependencies.pinned(), dependencies.wanted()) == [], 'run make dependencies'

def test_every_package_has_a_licence_and_a_reason():
    listed = dependencies.read(PAGE)
    assert len(listed) == len(dependencies.pinned()) > 200
    for name, row in listed.items(): assert len(row) == 5 and all(row) and 'not stated' not in row and '–' not in row[3:], name

@pytest.mark.parametrize('old, new, fault', [
    ('| numpy | ', '| numpi | ', 'numpy is missing'), ('| accelerate | 1', '| accelerate | 0', 'accelerate 0'), ('| Jinja2 | 3.1.6 | ', '| Jinja2 | 3.1.6 | GPL ', 'Jinja2: licence'),
    ('| faiss-cpu |', '| faiss-gpu |', 'faiss-gpu is not in constraints.txt'), ('| devices | direct |', '| devices | torch |', "accelerate: should be direct in ['devices']")])
def test_what_is_not_in_step_is_named(old, new, fault):
    assert PAGE.count(old) == 1
    lines = dependencies.faults(PAGE.replace(old, new), dependencies.pinned(), dependencies.wanted())
    assert any(fault in line for line in lines) and len(lines) <= 2

@pytest.mark.parametrize('fields, licence', [
    (dict(license_expression='MIT OR Apache-2.0', license='x', classifier=['License :: OSI Approved :: ISC']), 'MIT OR Apache-2.0'),
    (dict(license='BSD-3-Clause', classifier=['License :: OSI Approved :: BSD License']), 'BSD-3-Clause'),
    (dict(license='Copyright 2020\nAll rights', classifier=['License :: OSI Approved :: BSD License', 'Topic :: Software']), 'BSD License'),
    (dict(license='UNKNOWN', classifier=['License :: OSI Approved :: ISC License (ISCL)']), 'ISC License (ISCL)'),
    (dict(license='Do what\nyou want'), 'Do what you want'), (dict(license='UNKNOWN'), 'not stated'), ({}, 'not stated')])
def test_where_a_licence_is_read(fields, licence): assert dependencies.licence(fields) == licence

def test_why_a_package_is_there():
    found = {'a': dict(requires_dist=['b', 'C.d>=1; extra == "more"', 'never; sys_platform == "win32"']), 'b': dict(requires_dist=['e; python_version >= "3.13"']),
             'c-d': {}, 'e': dict(requires_dist=['a']), 'never': {}}
    groups = {'cmlf': [Requirement('a')], 'extra': [Requirement('b'), Requirement('A[more]')]}
    assert dependencies.reasons(groups, found) == {'a': (['cmlf', 'extra'], ['direct', 'direct']), 'b': (['cmlf', 'extra'], ['a', 'direct']), 'e': (['cmlf'], ['b']), 'c-d': (['extra'], ['a'])}

def test_make_has_both():
    text = (ROOT/'Makefile').read_text()
    assert 'tools/dependencies.py' in text and 'tools/audit.py' in text

# --- advisories, in the format of https://github.com/pypa/advisory-database

def advisory(name='jinja2', id='PYSEC-2026-1', versions=(), ranges=(('ECOSYSTEM', [dict(introduced='0'), dict(fixed='3.2')]),), **more):
    affected = dict(package=dict(name=name, ecosystem='PyPI', purl=f'pkg:pypi/{name}'), versions=list(versions),
                    ranges=[dict(type=t, events=e) | (dict(repo='https://example.org/x') if t == 'GIT' else {}) for t, e in ranges])
    return dict(id=id, details='Text.', affected=[affected], references=[dict(type='FIX', url='https://example.org')], aliases=['CVE-2026-1'],
                modified='2026-03-04T05:06:07Z', published='2026-01-02T03:04:05Z') | more

@pytest.fixture
def database(tmp_path):
    "A function that writes advisories as the database has them; its folder."
    def write(*advisories):
        for a in advisories:
            path = tmp_path/'db'/'vulns'/a['affected'][0]['package']['name']/f'{a["id"]}.yaml'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(a))
        return tmp_path/'db'
    return write

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    "A function that runs the tool for two pinned packages; exit code, stdout, stderr."
    (tmp_path/'constraints.txt').write_text('# pins\nJinja2==3.1.6\nzope.interface==8.0\nstandard-sunau==3.13.0; python_version >= "3.99"\n')
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['audit.py', *map(str, arguments), '--constraints', str(tmp_path/'constraints.txt')])
        with pytest.raises(SystemExit) as e: audit.main()
        out, err = capsys.readouterr()
        assert (e.value.code == 0) == ('none is affected' in out)
        return e.value.code, out, err
    return run

NOTHING = advisory('zope-interface', 'PYSEC-2026-9', ranges=[('ECOSYSTEM', [dict(introduced='0'), dict(fixed='5')])])

def test_an_affected_package_is_named(database, run):
    code, out, _ = run(database(advisory(), NOTHING))
    assert code == 1 and out.splitlines()[1:] == ['jinja2 3.1.6: PYSEC-2026-1, CVE-2026-1: fixed in 3.2']
    assert '3 packages, 2 advisories, the last change to those that were read is of 2026-03-04' in out

def test_none_is_affected(database, run): assert run(database(NOTHING, advisory('other')))[0] == 0

@pytest.mark.parametrize('events, hit', [
    ([dict(introduced='0'), dict(fixed='3.1.6')], False), ([dict(introduced='0'), dict(fixed='3.1.10')], True), ([dict(introduced='3.1.6')], True), ([dict(introduced='3.1.7')], False),
    ([dict(introduced='0'), dict(last_affected='3.1.6')], True), ([dict(introduced='0'), dict(last_affected='3.1.5')], False), ([dict(fixed='9'), dict(introduced='3.2')], False),
    ([dict(introduced='0'), dict(fixed='2'), dict(introduced='3.0'), dict(fixed='3.2')], True), ([dict(introduced='0'), dict(fixed='2'), dict(introduced='3.2')], False),
    ([dict(introduced='3.1.6.post1')], False), ([dict(introduced='3.1.6rc1'), dict(fixed='3.1.6')], False), ([dict(introduced=0)], True), ([dict(introduced='1!0')], False)])
def test_ranges(events, hit, database, run):
    assert run(database(advisory(ranges=[('ECOSYSTEM', events)])))[0] == hit
    assert audit.in_range(Version('3.1.6'), events) == hit

@pytest.mark.parametrize('versions, hit', [(['3.1.5', '3.1.6'], True), (['3.1.6.0'], True), (['3.1.5', '3.1.60'], False), (['2004d', '3.1.6'], True), (['2004d-x'], False)])
def test_versions_that_are_listed(versions, hit, database, run):
    git = ('GIT', [dict(introduced='0'), dict(fixed='8e2b1f')])
    assert run(database(advisory(versions=versions, ranges=[git])))[0] == hit

def test_names_are_compared_as_pypi_does(database, run):
    assert 'zope-interface 8.0' in run(database(advisory('Zope_Interface', ranges=[('ECOSYSTEM', [dict(introduced='0')])])))[1]
    assert 'no fixed version is named' in run(database())[1]

def test_advisories_that_do_not_count(database, run):
    other = advisory(id='PYSEC-2026-3')
    other['affected'][0]['package']['ecosystem'] = 'npm'
    assert run(database(advisory(withdrawn='2026-05-05T00:00:00Z'), other))[0] == 0

@pytest.mark.parametrize('ranges', [[('GIT', [dict(introduced='0'), dict(fixed='8e2b1f')])], [], [('ECOSYSTEM', [dict(introduced='not a version')])]])
def test_what_cannot_be_told_is_no_pass(ranges, database, run):
    code, out, _ = run(database(advisory(ranges=ranges)))
    assert code == 1 and 'cannot be told' in out

@pytest.mark.parametrize('text', ['a: [', 'just text', '- 1', 'id: PYSEC-2026-1', '!!python/object/apply:os.system ["touch ran"]'])
def test_an_unreadable_advisory_about_a_package_of_ours_is_no_pass(text, database, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (database(NOTHING, advisory())/'vulns'/'jinja2'/'PYSEC-2026-1.yaml').write_text(text)
    code, _, err = run(tmp_path/'db')
    assert code == 3 and 'not checked: vulns/jinja2/PYSEC-2026-1.yaml' in err and not (tmp_path/'ran').exists()

def test_other_files_of_the_repository_are_passed_over(database, run):
    folder = database(NOTHING)
    (folder/'.github').mkdir()
    (folder/'.github'/'workflow.yaml').write_text('on: push\njobs: {}')
    (folder/'README.md').write_text('# Advisories')
    assert run(folder)[0] == 0

def test_no_database_is_no_pass(tmp_path, run, monkeypatch):
    monkeypatch.setattr(audit, 'command', list)
    assert run()[0] == 3 and 'pip-audit is not installed' in run()[2]
    (tmp_path/'empty').mkdir()
    (tmp_path/'a.txt').write_text('x')
    for path, words in ((tmp_path/'empty', 'holds no advisories'), (tmp_path/'none', 'no such folder'), (tmp_path/'a.txt', 'neither a folder nor a zip')):
        code, _, err = run(path)
        assert code == 3 and words in err

def test_a_zip_is_read_and_not_unpacked(tmp_path, run, monkeypatch):
    "JSON of osv.dev, and names that would leave a folder: nothing is written."
    (tmp_path/'cwd').mkdir()
    monkeypatch.chdir(tmp_path/'cwd')
    with zipfile.ZipFile(tmp_path/'all.zip', 'w') as z:
        z.writestr('GHSA-1.json', json.dumps(advisory(id='GHSA-1')))
        for name in ('../PYSEC-2.json', '/tmp/../PYSEC-3.json', 'a/../../../PYSEC-4.json'): z.writestr(name, json.dumps(advisory('zope.interface', name[-12:-5], ['8.0'])))
    before = sorted(p for p in tmp_path.rglob('*'))
    code, out, _ = run(tmp_path/'all.zip')
    assert code == 1 and len(out.splitlines()) == 5 and 'GHSA-1' in out and sorted(p for p in tmp_path.rglob('*')) == before

def test_a_damaged_zip_is_no_pass(tmp_path, run):
    with zipfile.ZipFile(tmp_path/'all.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('GHSA-1.json', json.dumps(advisory()))
    data = bytearray((tmp_path/'all.zip').read_bytes())
    data[60:90] = bytes(30)
    (tmp_path/'all.zip').write_bytes(data)
    assert run(tmp_path/'all.zip')[0] == 3

# --- pip-audit

def pip_audit(monkeypatch, tmp_path, output, code=0):
    "A stand-in for pip-audit that prints what pip-audit 2.10 prints."
    (tmp_path/'fake.py').write_text(f'import sys\nassert sys.argv[1] == "-r"\nprint({output!r})\nprint("No known vulnerabilities found", file=sys.stderr)\nsys.exit({code})')
    monkeypatch.setattr(audit, 'command', lambda: [sys.executable, str(tmp_path/'fake.py')])

def answer(name, *vulns, version='3.1.6', **more): return dict(name=name, version=version, vulns=list(vulns)) | more

BAD = dict(id='PYSEC-2026-1', fix_versions=['3.2'], aliases=['CVE-2026-1'], description='Text.')
SKIPPED = dict(name='zope-interface', skip_reason='Dependency not found on PyPI and could not be audited: zope-interface (8.0)')

@pytest.mark.parametrize('found, code, words', [
    ([answer('jinja2'), answer('zope.interface')], 0, 'none is affected'), ([answer('jinja2', BAD), answer('zope-interface')], 1, 'jinja2 3.1.6: PYSEC-2026-1, CVE-2026-1: fixed in 3.2'),
    ([answer('jinja2'), SKIPPED], 3, 'skipped 1 of 3 packages, such as zope-interface'), ([answer('jinja2')], 3, 'skipped 1 of 3'), ([], 3, 'skipped 2 of 3'),
    ([answer('jinja2', BAD), SKIPPED], 1, 'not checked: 1 packages')])
def test_pip_audit_says_no_vulnerabilities_found_although_it_skipped_packages(found, code, words, run, monkeypatch, tmp_path):
    pip_audit(monkeypatch, tmp_path, json.dumps(dict(dependencies=found, fixes=[])), code % 3)
    got, out, err = run()
    assert got == code and words in out + err

@pytest.mark.parametrize('output', ['', 'No known vulnerabilities found', '[]', '{}', '{"dependencies": 5'])
def test_pip_audit_that_fails_is_no_pass(output, run, monkeypatch, tmp_path):
    pip_audit(monkeypatch, tmp_path, output)
    assert run()[0] == 3

def test_the_command(database):
    "As people call it; the versions of constraints.txt."
    torch = re.search(r'^torch==(\S+)', (ROOT/'constraints.txt').read_text(), re.M)[1]
    done = subprocess.run([sys.executable, ROOT/'tools'/'audit.py', database(advisory('torch', versions=[torch]))], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 1 and f'torch {torch}: PYSEC-2026-1' in done.stdout, done.stderr
    shutil.rmtree(database())
    done = subprocess.run([sys.executable, ROOT/'tools'/'audit.py', database(NOTHING)], capture_output=True, text=True)
    assert done.returncode == 0 and 'none is affected' in done.stdout, done.stderr
