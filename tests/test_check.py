"`cmlf reproduce --check`: whatever is changed in a report or its ranks is named, and nothing else is."
import contextlib, shutil

import pandas as pd
import pytest

from cmlf.appendix.check import cannot_check, check_all, check_report
from cmlf.appendix.ranks import read_ranks, write_ranks
from cmlf.cli import run_command
from cmlf.core import CmlfError, read_json, write_json
from cmlf.report import Report, write_index, write_provenance
from cmlf.runs import RUN_VERSION, save_ranks
from cmlf.tables import runs_needed
from command import ROOT

RUN = '3cmlf-scratch-chm-b8-s0'

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The smoke report of Table II with its ranks; the notebooks share its runs."
    out = tmp_path_factory.mktemp('check')/'small'
    report = Report(2, 'smoke', out=str(out))
    for show in (report.show_table, report.show_claims, report.write_record): show()
    for spec in runs_needed(report.exp, [2], 1): save_ranks(report.exp.run(spec), out/'ranks')
    write_provenance(out)
    write_index(out)
    return out

@pytest.fixture
def report(made, tmp_path): return shutil.copytree(made, tmp_path/'small')

def ranks_of(report, name=RUN): return next((report/'ranks').glob(f'{name}-*.npz'))

def edit(path, change):
    frame = pd.read_csv(path)
    frame = change(frame)
    frame.to_csv(path, index=False)

def add(frame, column, by):
    frame.loc[2, column] += by
    return frame

@contextlib.contextmanager
def edited_json(path):
    "The content of a JSON file, which is written back after the block has changed it."
    found = read_json(path)
    yield found
    write_json(path, found)

def edit_metadata(path, **changes):
    metadata, history, results = read_ranks(path)
    write_ranks(path, metadata | changes, history, results)
    return metadata

def wrong(report): return '\n'.join(check_report(report).wrong)

def test_an_unchanged_report_passes_and_says_how_much_was_compared(report):
    check = check_report(report)
    assert not check.wrong and check.cells > 200 and check.tables == 2 and check.files == 5
    assert str(check).startswith(f'small: {check.cells} cells of 2 tables follow from 5 ranks files; 6 cells are not checked (6 ranks_only')

# --- cells and rows

@pytest.mark.parametrize('table,column,by', [('table2', 't2a_r1', 5), ('table2', 'a2t_map10_x', 0), ('table2', 't2a_r5_low', .01), ('table2', 'minutes', 1),
                                             ('table2', 'last_a2t_r10', -1), ('table2', 'audio_updates', 1), ('table2', 'seeds', 1),
                                             ('table2', 'paper_t2a_r1', 1), ('claims2', 'difference', .5), ('claims2', 'p_holm', -.01)])
def test_a_changed_cell_is_named(report, table, column, by):
    if column.endswith('_x'): edit(report/f'{table}.csv', lambda f: f.assign(**{column: 1}))   # a column that nobody makes
    else: edit(report/f'{table}.csv', lambda f: add(f, column, by))
    lines = [l for l in check_report(report).wrong if not l.startswith('index.html')]
    line = next(l for l in lines if f' {column}' in l and 'row 3' in l)
    assert line.startswith(f'{table}.csv row 3') and ' in the report, ' in line and f'from {"ranks/"}' in line
    assert all(f' {column}: ' in l for l in lines), lines

def test_the_line_has_both_values_and_the_file(report):
    old = pd.read_csv(report/'table2.csv').t2a_r1[2]
    edit(report/'table2.csv', lambda f: add(f, 't2a_r1', 5))
    assert f'table2.csv row 3 (scratch 3) t2a_r1: {old + 5:.2f} in the report, {old:.2f} from ranks/{ranks_of(report).name}' in wrong(report)

def test_an_added_and_a_removed_row_are_named(report):
    edit(report/'table2.csv', lambda f: pd.concat([f[:1].assign(stage=4), f]))
    found = check_report(report).wrong
    assert 'table2.csv row 1 (scratch 4): in the report, but no ranks give such a row' in found and len(found) <= 2
    edit(report/'table2.csv', lambda f: f[2:])
    assert 'table2.csv: no row scratch 1, but the ranks give it' in wrong(report)

def test_a_row_twice_and_rows_in_another_order_are_named(report):
    edit(report/'claims2.csv', lambda f: pd.concat([f, f[:1]]))
    assert 'stage 2 over stage 1, scratch #2): in the report, but' in wrong(report)
    edit(report/'claims2.csv', lambda f: f[:-1][::-1])
    assert 'claims2.csv: rows in another order' in wrong(report)

@pytest.mark.parametrize('name', ['table2.md', 'table2.tex', 'claims2.md', 'index.html'])
def test_what_people_read_is_compared_too(report, name):
    path = report/name
    path.write_text(path.read_text().replace('pretrained', 'untrained', 1))
    found = check_report(report).wrong
    assert len(found) == 1 and found[0].startswith(name)

def test_a_removed_table_is_named(report):
    (report/'claims2.csv').unlink()
    assert 'claims2.csv: missing' in wrong(report)

def test_a_table_whose_record_is_gone_is_not_passed(report):
    shutil.copy(report/'table2.csv', report/'table1.csv')
    assert 'table1.csv: a table that no record of the report names' in wrong(report)

@pytest.mark.parametrize('change,path', [(lambda r: r['tables'][0].update(title='Table 2'), 'tables.table2.title'),
                                         (lambda r: r['tables'][0]['notes'].append('More.'), 'tables.table2.notes.'),
                                         (lambda r: r['in_force']['optimiser'].update(tau=1), 'in_force.tau'),
                                         (lambda r: r['corpus']['clips'].update(test=99), 'corpus.clips.test')])
def test_an_edited_record_is_named(report, change, path):
    with edited_json(report/'table2.json') as record:
        change(record)
    assert f'table2.json {path}' in wrong(report)

# --- the files of ranks

def test_a_removed_file_is_named(report):
    path = ranks_of(report)
    path.unlink()
    found = wrong(report)
    assert f'ranks/{path.name}: missing' in found and 'table2.csv row 3 (scratch 3) t2a_r1' in found and len(found.splitlines()) < 40

def test_a_damaged_file_is_named(report):
    path = ranks_of(report)
    path.write_bytes(path.read_bytes()[:-100])
    assert f'ranks/{path.name}: damaged' in wrong(report)

def test_a_renamed_file_is_named(report):
    path = ranks_of(report)
    other = ranks_of(report, '3cmlf-pretrained-chm-b8-s0')
    shutil.copy(other, path)
    assert f'ranks/{path.name}: holds the ranks of 3cmlf-pretrained-chm-b8-s0, key {other.stem[-12:]}' in wrong(report)

def test_a_file_of_another_key_is_named(report):
    path = ranks_of(report)
    path.rename(moved := path.with_name(f'{RUN}-{"0" * 12}.npz'))
    assert f'ranks/{path.name}: missing, the report names this run; {moved.name} belongs to another key' in wrong(report)

def test_changed_ranks_change_cells(report):
    path = ranks_of(report)
    metadata, history, results = read_ranks(path)
    write_ranks(path, metadata, history, results | dict(stage3=results['stage1_last']))
    assert 'table2.csv row 3 (scratch 3)' in wrong(report) and path.name in wrong(report)

def test_a_changed_seed_is_named(report):
    path = ranks_of(report)
    spec = read_ranks(path)[0]['spec']
    edit_metadata(path, spec=spec | dict(seed=1))
    assert f'ranks/{path.name}: spec.seed is 1 in the ranks, 0 in the report' in wrong(report)

def test_a_seed_changed_everywhere_is_another_key(report):
    "The key is computed from the settings, so records and ranks that agree are not enough."
    with edited_json(report/'table2.json') as record:
        run = next(r for r in record['runs'].values() if r['name'] == RUN)
        run['spec']['seed'] = 1
    edit_metadata(ranks_of(report), spec=run['spec'])
    assert f'key {run["key"]} in the ranks, ' in wrong(report)

def test_other_seeds_in_the_record_are_named(report):
    for name, change in {'table2.json': lambda r: r['asked'].update(seeds=2), 'provenance.json': lambda r: r.update(seeds=3)}.items():
        with edited_json(report/name) as record: change(record)
    edit(report/'table2.csv', lambda f: f.assign(seeds=2)) # but ranks of one seed
    found = wrong(report)
    assert 'provenance.json seeds: 3, in the records 2' in found and 'table2.csv row 1' in found

@pytest.mark.parametrize('module', ['training', 'mining', 'encoders'])
def test_a_moved_version_is_named(report, module, monkeypatch):
    monkeypatch.setitem(RUN_VERSION, module, 99)
    was = read_ranks(ranks_of(report))[0]['run_version'][module]
    assert f'ranks/{ranks_of(report).name}: version of {module}: {was} in the ranks, 99 in the code' in wrong(report)

def test_a_version_that_no_run_reads_changes_nothing(report, monkeypatch):
    monkeypatch.setitem(RUN_VERSION, 'baselines', 99)
    assert wrong(report) == ''

def test_an_edited_version_in_the_ranks_is_named(report):
    path = ranks_of(report)
    versions = read_ranks(path)[0]['run_version']
    edit_metadata(path, run_version=versions | dict(loss=7))
    assert f'ranks/{path.name}: run_version.loss is 7 in the ranks, {versions["loss"]} in the report' in wrong(report)

# --- provenance

def test_an_edited_provenance_is_named(report):
    with edited_json(report/'provenance.json') as origin: origin['runs'][0]['minutes'] += 1
    assert f'provenance.json run {origin["runs"][0]["name"]} minutes: ' in wrong(report)

# --- the command

def test_a_report_without_ranks_is_an_error_if_it_is_asked_for(report, capsys):
    shutil.rmtree(report/'ranks')
    with pytest.raises(CmlfError, match='small: no ranks are committed; nothing can be checked'): check_all(out=str(report))
    assert run_command(['reproduce', '--check', '--out', str(report)]) == 2
    assert capsys.readouterr().err == 'cmlf: small: no ranks are committed; nothing can be checked\n'

def test_a_report_from_recordings_is_left_out_without_them(report, monkeypatch):
    monkeypatch.delenv('CMLF_ESC_DIR', raising=False)
    assert cannot_check(report) == ''
    with edited_json(report/'table2.json') as record: record['in_force']['corpus']['source'] = 'recordings'
    assert 'say where its recordings are' in cannot_check(report) and cannot_check(report, 'recordings') == ''

def test_the_command_fails_with_a_line_per_difference(report, capsys):
    edit(report/'table2.csv', lambda f: add(f, 't2a_r1', 5))
    assert run_command(['reproduce', '--check', '--out', str(report)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('small table2.csv row 3 (scratch 3) t2a_r1') and lines[-1] == 'small: 2 differences'

def test_options_that_have_no_meaning_are_refused(capsys):
    assert run_command(['reproduce', '--check', '--set', 'tau=0.2']) == 2
    assert capsys.readouterr().err == 'cmlf: --check takes what was asked for from the report: leave out --set\n'

def test_claims_are_checked_against_their_ranks(tmp_path):
    "The committed claims, with one edited effect; the tables are left out, so this takes seconds."
    report = shutil.copytree(ROOT/'reports'/'mini', tmp_path/'mini', ignore=shutil.ignore_patterns('table*', 'claims?.*', 'notebooks', 'sounds'))
    edit(report/'variants.csv', lambda f: add(f, 'mean', 1))
    lines = [l for l in check_report(report).wrong if not l.startswith(('provenance', 'index'))]
    assert len(lines) == 1 and lines[0].startswith('variants.csv row 3 (stage 3 random, BatchNorm fixed) mean: ') and 'ranks/stage3-scratch-chm-' in lines[0]
