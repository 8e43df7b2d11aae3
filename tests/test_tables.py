"Tables of the smoke runs: costs, scores after each stage, intervals and standard deviations."
import pandas as pd
import pytest

from cmlf.config import get_profile
from cmlf.experiments import Experiment
from cmlf.appendix.claims_page import power_table, pretty_power
from cmlf.appendix.figures import size_figure, stage_figure
from cmlf.tables import runs_needed, table

@pytest.fixture(scope='module')
def smoke_runs(): return Experiment(get_profile('smoke'))   # the notebooks share these runs

def test_minutes_of_a_mined_row_include_its_parents(smoke_runs):
    one = table(smoke_runs, 1)
    mined, joint, staged = (one[(one.system == s) & (one.audio_encoder == 'scratch') & (one.chm.fillna('') == c)].iloc[0]
                            for s, c in (('3CMLF', 'yes'), ('ResNet38+BERT', ''), ('3CMLF', 'no')))
    run = smoke_runs.run(smoke_runs.spec('3cmlf', 'scratch', True))
    assert run.metadata['vector_minutes'] > 0
    assert mined.minutes == pytest.approx(mined.minutes_own + joint.minutes_own, abs=0.02) and staged.minutes == staged.minutes_own

def test_table_two_has_minutes_and_epoch_of_each_stage(smoke_runs):
    two = table(smoke_runs, 2)
    run = smoke_runs.run(smoke_runs.spec('3cmlf', 'scratch', True))
    scratch = two[two.audio_encoder == 'scratch']
    assert scratch.minutes_stage.sum() == pytest.approx(run.metadata['minutes'], abs=0.03)
    assert scratch.selected.tolist() == [f'{a} of {b}' for a, b in zip(run.metadata['selected'], run.metadata['stage_epochs'])]
    for row in scratch.itertuples():
        if row.selected.startswith(f'{run.metadata["stage_epochs"][row.stage - 1]} of'): assert row.last_t2a_r1 == row.t2a_r1

def test_one_seed_has_intervals_and_two_have_deviations(smoke_runs):
    one = table(smoke_runs, 2)
    assert (one.t2a_r1_low <= one.t2a_r1).all() and (one.t2a_r1 <= one.t2a_r1_high).all() and 't2a_r1_sd' not in one
    assert one[['t2a_r50', 'a2t_map10']].notna().all(axis=None)
    two = table(smoke_runs, 2, seeds=2)
    assert two.t2a_r1_sd.notna().all()

def test_a_run_of_only_is_trained_after_what_it_starts_from(tmp_path):
    exp = Experiment(get_profile('smoke'), tmp_path, only='*scratch* ce*')
    names = [s.name for s in runs_needed(exp, [1, 2, 3], 1)]
    assert names.index('experts-b8-s0') < names.index('ce-b8-s0') and not any('moee' in n or 'pretrained' in n for n in names)

def test_figures_of_tables_without_runs_are_empty(tmp_path):
    exp = Experiment(get_profile('smoke'), tmp_path, only='nothing')
    for n, figure in ((2, stage_figure), (3, size_figure)): assert figure(table(exp, n)).axes

def test_one_seed_says_nothing_about_what_seeds_could_tell():
    row = dict(claim='C2', comparison='mined over random', paper_t2a=.5, t2a_sd_clips=2., t2a_sd_seeds=float('nan'))
    power = power_table(pd.DataFrame([row, row | dict(t2a_sd_seeds=1.)]), 250)
    assert power['found with 1 seed'].isna().tolist() == [True, False]
    assert pretty_power(power).index.tolist() == [1] and not len(pretty_power(power[:1]))
