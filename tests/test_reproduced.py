"REPRODUCED.md: its commands, its answers, and that an answer is never kept or given by mistake."
import runpy, shutil, subprocess, sys

import pandas as pd
import pytest

from cmlf.appendix import reproduced
from cmlf.appendix.reproduced import (EXPECT, FORM, PARTS, READ, Part, answer_part, commit_of, compared, fill, is_answered, read_form,
                                      render_form, tolerance)
from cmlf.core import CmlfError, read_json
from command import ROOT

MINI = ROOT/'reports'/'mini'

# --- the committed form

def test_the_committed_form_shows_its_answers_and_no_others():
    assert FORM.read_text(encoding='utf-8') == render_form(read_form(FORM))

def test_parts_are_in_the_order_of_the_badges_and_have_one_name_each():
    badges = list(reproduced.BADGES)
    order = [badges.index(p.badge) for p in PARTS]
    assert order == sorted(order) and set(order) == set(range(5)) and len({p.name for p in PARTS}) == len(PARTS)
    assert all(p.by_hand or p.command for p in PARTS)

# --- numbers

def test_the_committed_report_is_within_its_own_tolerances():
    for name in EXPECT:
        found = compared(EXPECT[name](), READ[name](MINI))
        assert len(found) >= 10 and all(e['within'] for e in found), name

def test_tolerance_is_from_seeds_where_there_are_three():
    assert tolerance([50., 52., 54.])[:2] == (52., 4.)
    assert [tolerance([50.] * n)[1] for n in (1, 2)] == [reproduced.SEEN] * 2 and '2 seeds' in tolerance([50., 51.])[2]

@pytest.mark.parametrize('column,by,within', [('t2a_r1', .98, True), ('t2a_r1', -1.02, False), ('a2t_r1', 1.02, False)])
def test_a_number_outside_its_tolerance_is_found(tmp_path, column, by, within):
    "`by`: in tolerances."
    report = shutil.copytree(MINI, tmp_path/'report', ignore=shutil.ignore_patterns('ranks', 'figures', 'sounds', 'notebooks'))
    table = pd.read_csv(report/'table1.csv')
    entries = [e for e in EXPECT['tables']() if e['what'].startswith('Table I: CE')]
    table.loc[0, column] += by * entries[column == 'a2t_r1']['tolerance']
    table.to_csv(report/'table1.csv', index=False)
    outside = [e['what'] for e in compared(entries, READ['tables'](report)) if not e['within']]
    assert outside == ([] if within else [f'Table I: CE, {dict(t2a_r1="T2A R@1", a2t_r1="A2T R@1")[column]}'])

@pytest.mark.parametrize('expected,found,within', [('higher', 'lower', False), ('lower', 'higher', False), ('higher', 'cannot tell', True),
                                                   ('cannot tell', 'lower', True), ('lower', 'lower', True), ('lower', None, False)])
def test_only_the_opposite_verdict_is_a_contradiction(expected, found, within):
    entry = dict(what='C1', expected=expected)
    assert compared([entry], {'C1': found} if found else {})[0]['within'] == within

# --- answers

def part(command, name='doctor'): return Part(name, 'Functional', 'A part', command, '')

def test_a_command_that_fails_is_a_no_with_its_last_line(tmp_path):
    found = answer_part(part('echo first; echo the reason; exit 3'), tmp_path/'work', tmp_path)
    assert found['answer'] == 'no' and found['note'] == 'exit code 3: the reason'

def test_numbers_decide_even_if_the_command_succeeds(tmp_path, monkeypatch):
    entries = [dict(what=str(i), expected=1., tolerance=.1, why='') for i in range(10)]
    for wrong, answer in ((0, 'yes'), (1, 'yes'), (2, 'no')):
        monkeypatch.setitem(reproduced.READ, 'doctor', lambda out: {str(i): 1. + (i < wrong) for i in range(10)})
        found = answer_part(part('true'), tmp_path/'work', tmp_path, entries)
        assert found['answer'] == answer and found['note'] == f'{10 - wrong} of 10 are within'

@pytest.fixture
def counted(tmp_path, monkeypatch):
    "Two parts that count how often they are run, one that fails, and a form of them."
    count = tmp_path/'count'
    parts = [part(f'echo {n} >> {count}; {"true" if n != "c" else "false"}', n) for n in 'abc']
    monkeypatch.setattr(reproduced, 'PARTS', parts + [Part('hand', 'Available', 'By hand', '', '', by_hand=True)])
    monkeypatch.setattr(reproduced, 'EXPECT', {})
    monkeypatch.setattr(reproduced, 'ROOT', tmp_path)
    monkeypatch.setattr(reproduced, 'commit_of', lambda **_: 'abc')
    ask = lambda **more: fill(tmp_path/'form.md', work=tmp_path/'work', **more)
    return tmp_path, ask, lambda: count.read_text().split()

def test_answers_are_kept_until_they_are_asked_again(counted):
    folder, ask, runs = counted
    assert ask(only='a b') and runs() == ['a', 'b']
    assert not ask() and runs() == ['a', 'b', 'c']
    assert ask(only='a', again=True) and runs() == ['a', 'b', 'c', 'a']
    assert '| A part (`c`) | Functional | no |' in (folder/'form.md').read_text()

def test_another_commit_asks_again_and_keeps_what_was_not_asked(counted, monkeypatch):
    folder, ask, runs = counted
    ask(only='a b')
    monkeypatch.setattr(reproduced, 'commit_of', lambda **_: 'def')
    ask(only='a')
    answers = read_form(folder/'form.md')['answers']
    assert runs() == ['a', 'b', 'a'] and (answers['a']['commit'], answers['b']['commit']) == ('def', 'abc')

def test_answers_for_uncommitted_code_are_not_kept(): assert not is_answered(dict(commit='abc+', machine={}), 'abc+', {})

def test_an_interrupted_form_has_the_answers_so_far(counted, monkeypatch):
    folder, ask, runs = counted
    def stop(p, *more):
        if p.name == 'b': raise KeyboardInterrupt
        return answer_part(p, *more)
    monkeypatch.setattr(reproduced, 'answer_part', stop)
    with pytest.raises(KeyboardInterrupt): ask()
    assert list(read_form(folder/'form.md')['answers']) == ['a']

def test_a_person_answers_only_what_no_command_can(counted):
    folder, ask, runs = counted
    assert ask(answers=['hand=yes: -- by me']) and '**yes: -- by me**' in (folder/'form.md').read_text()
    assert read_form(folder/'form.md')['answers']['hand']['answer'] == 'yes: -- by me'
    for text, words in (('a=yes', 'its command answers'), ('nobody=yes', 'unknown part|part'), ('hand', 'NAME=TEXT')):
        with pytest.raises(CmlfError, match=words): ask(answers=[text])

def test_a_damaged_form_is_refused_and_left_as_it_is(counted):
    folder, ask, _ = counted
    (folder/'form.md').write_text('# Reproduced\n<!-- answers\n{"answers": \n-->\n')
    before = (folder/'form.md').read_bytes()
    with pytest.raises(CmlfError, match='its answers cannot be read'): ask()
    assert (folder/'form.md').read_bytes() == before

def test_the_form_itself_is_no_change_of_the_code(tmp_path):
    git = lambda *a: subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *a], cwd=tmp_path, check=True, capture_output=True)
    git('init')
    for name in ('form.md', 'code.py'): (tmp_path/name).write_text('1')
    git('add', '.'); git('commit', '-m', 'first')
    clean = commit_of(tmp_path, tmp_path/'form.md')
    (tmp_path/'form.md').write_text('2')
    assert commit_of(tmp_path, tmp_path/'form.md') == clean and len(clean) >= 7
    (tmp_path/'code.py').write_text('2')
    assert commit_of(tmp_path, tmp_path/'form.md') == f'{clean}+'

# --- the tool

def tool(*arguments): return subprocess.run([sys.executable, ROOT/'tools'/'reproduced.py', *map(str, arguments)], cwd=ROOT, capture_output=True,
                                            text=True, timeout=300)

def test_the_smallest_form(tmp_path):
    done = tool('--profile', 'smoke', '--only', 'doctor', '--form', tmp_path/'form.md', '--work', tmp_path/'work')
    assert done.returncode == 0, done.stderr
    answer = read_form(tmp_path/'form.md')['answers']['doctor']
    assert answer['answer'] == 'yes' and answer['minutes'] > 0 and answer['memory'] > 20 and answer['machine']['cores']
    assert 'Table I: CE, T2A R@1' in (tmp_path/'form.md').read_text()

def test_make_calls_the_tool(monkeypatch, capsys):
    assert '$(BIN)/python tools/reproduced.py $(ARGS)' in (ROOT/'Makefile').read_text()
    monkeypatch.setattr(sys, 'argv', ['reproduced.py', '--profile', 'large', '--form', 'unused.md'])
    assert runpy.run_path(str(ROOT/'tools'/'reproduced.py'))['main']() == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "'large'" in error

def test_the_claims_are_asked_with_the_seeds_of_the_report():
    command = next(p.command for p in PARTS if p.name == 'claims')
    assert f"--seeds {read_json(MINI/'claims.json')['asked']['seeds']} " in command
