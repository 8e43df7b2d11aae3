"The key of a run changes with every setting that the run reads, every file it uses, and the code of every module."
import dataclasses

import numpy as np
import pandas as pd
import pytest
import soundfile

from cmlf import baselines, config, training
from cmlf.config import GROUPS, SETTINGS, get_profile, pick, resolve_paths
from cmlf.experiments import Experiment
from cmlf.runs import RUN_VERSION, RunSpec, run_config

import pinned

# --- the code: a module that changes needs a new version, or a reason why results stay the same

@pytest.mark.parametrize('name', RUN_VERSION)
def test_changed_code_has_a_new_version_or_a_reason(name):
    stored = pinned.read()[name]
    assert len(stored['why'].split()) >= 4, f'{name}: give a reason for the new hash, as a sentence'
    assert (stored['version'], stored['hash']) == (RUN_VERSION[name], pinned.code_hash(name)), (
        f'the code of {name} changed. If a run would now give other results, raise RUN_VERSION[{name!r}] in nbs/13_runs.ipynb. '
        f'Then: python tests/pinned.py {name} "why results change, or why they stay the same"')

def test_every_module_that_results_depend_on_has_a_version():
    "Except modules that only show results: tables, report, command."
    modules = {p.relative_to(pinned.ROOT/'cmlf').with_suffix('').as_posix() for p in (pinned.ROOT/'cmlf').rglob('*.py')}
    shown = {'tables', 'report', 'cli', 'appendix/figures', 'appendix/page', 'appendix/executors', 'appendix/ranks', 'appendix/effects', 'appendix/choices', 'appendix/norm',
             'appendix/comparisons', 'appendix/claims_page', 'appendix/geometry',
             'appendix/gap', 'appendix/false_negatives',  'appendix/demo_models', 'appendix/encoding', 'appendix/hub', 'appendix/evaluation', 'appendix/small', 'search', 'appendix/sound_store', 'appendix/nearest', 'appendix/web',
             'appendix/card', 'appendix/sentence', 'appendix/bad_input', 'appendix/bad_models', 'appendix/notebook_runs', 'appendix/check', 'appendix/reproduced', '__init__', '_modidx', 'appendix/__init__'}
    assert modules - shown == {m for parts in pinned.PARTS.values() for m in parts if '.' not in m}

def test_comments_and_docstrings_do_not_count():
    a = 'def f(x, # one\n      ):\n    "A sentence."\n    return x + 1\n'
    b = 'def f(x):\n    "Another one."\n    # a comment\n    return x + 1\n'
    assert pinned.hash_of(a) == pinned.hash_of(b) != pinned.hash_of(b.replace('+', '-'))
    both = a + 'def g(): return 1\n'
    assert pinned.hash_of(both, ['f']) == pinned.hash_of(a, ['f']) != pinned.hash_of(both)

# --- settings

OTHER = dict(   # another valid value for each setting
    source='recordings', n_train=70, n_val=18, n_test=30, subset=8, corpus_seed=1, seconds=1.5, hop=800, width=8, head_hidden=48,
    joint_dim=48, text_model='minilm', text_pool='cls', train_word_table=True, text_layers=1, text_frozen=1, panns='FILE', dropout=0.3, block_dropout=0.3, spec_augment=False,
    epochs=4, budget='per_stage', stage_split=(2, 1, 1), keep_start=False, batch_size=16, lr=1e-3, text_lr=1e-3, schedule='constant', lr_step=3,
    restart_schedule=False, clip_norm=0., tau=0.1, loss='triplet_max', hardest=3, amp=False, kinds=('hard', 'random', 'easy'), ancillary='text',
    remine=False, groups=False, freeze_head=True, pretrain_epochs=2, pretrain_scenes=80, pretrain_lr=1e-4, expert_features='audio=FILE,vggsound=FILE',
    expert_width=8, expert_epochs=2, words='FILE', ce_epochs=3, ce_batch_size=8, ce_lr=0.02, ce_dim=48,
    neighbours=4, skip=2, mined_share=0.5, drop='random', loss_in='last', above=0.2, beta=0.3, soft=0.5, frozen_mode='train', last_rate=0.5,
    last_norm='eval', vectors_from='start', trains=('both', 'both', 'both'), encoder='cnn14', norm='group', last_momentum=0.2)

CORPUS = {'source', 'n_train', 'n_val', 'n_test', 'corpus_seed', 'seconds'}   # settings of a composed corpus: they change the hash of its content
SCORED = 'used only for scores after training'
HARMLESS = {   # settings that cannot change a run of that kind, and why
    'subset': SCORED,
    'panns': 'only read by pre-trained runs', 'words': 'only read by CE and MoEE', 'expert_features': 'only read by the experts'}

SPECS = dict(tagger=RunSpec('tagger', batch_size=8), experts=RunSpec('experts', batch_size=8), ce=RunSpec('ce', batch_size=8), moee=RunSpec('moee', batch_size=8),
             joint=RunSpec('baseline', 'pretrained', batch_size=8), staged=RunSpec('3cmlf', 'pretrained', batch_size=8),
             mined=RunSpec('3cmlf', 'pretrained', True, 8), scratch=RunSpec('3cmlf', 'scratch', True, 8))

@pytest.fixture(scope='module')
def smoke(): return get_profile('smoke')

@pytest.fixture(scope='module')
def any_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('files')/'file.bin'
    path.write_bytes(b'content')
    return path

def changed(profile, setting, file, events):
    value = OTHER[setting]
    if isinstance(value, str): value = value.replace('FILE', str(file))
    return profile.replace(**{setting: value})

def read_by(exp, spec):
    "Settings that a run and all its parents read."
    names = set(run_config(exp.profile, spec))
    if spec.audio == 'pretrained' and exp.profile.tagger.panns: names.add('panns')
    return names.union(*(read_by(exp, p) for p in exp.parents(spec)))

def test_there_is_another_value_for_every_setting():
    assert set(OTHER) == set(SETTINGS)
    smoke = pick(get_profile('smoke'), ' '.join(GROUPS))
    assert all(smoke[k] != (list(v) if isinstance(v, tuple) else v) for k, v in OTHER.items())

@pytest.mark.parametrize('setting', [k for k in OTHER if k not in ('source', 'panns')])
def test_a_setting_changes_the_key_of_every_run_that_reads_it(setting, smoke, any_file, tmp_path):
    before, after = (Experiment(p, tmp_path) for p in (smoke, changed(smoke, setting, any_file, None)))
    for name, spec in SPECS.items():
        # Table III's rows and the baselines have the batch size in their spec, set by `RunStore.spec`
        now = dataclasses.replace(spec, batch_size=after.profile.batches.batch_size)
        differs = before.key(spec) != after.key(now)
        reads = setting in read_by(after, now) or setting in CORPUS
        if setting == 'batch_size': reads = True
        assert differs == reads, (name, setting, differs)
        if not reads: assert setting in HARMLESS or setting in read_by_others(name), (name, setting)

def read_by_others(kind):
    "Settings that only other kinds of runs read."
    everything = {k for s in SPECS.values() for k in read_by(Experiment(get_profile('smoke'), '.'), s)}
    return everything - read_by(Experiment(get_profile('smoke'), '.'), SPECS[kind])

def test_panns_weights_count_by_content(smoke, tmp_path):
    files = [tmp_path/n for n in ('a.pth', 'b.pth', 'c.pth')]
    for f, text in zip(files, ('one', 'one', 'two')): f.write_text(text)
    keys = [Experiment(smoke.replace(panns=str(f)), tmp_path).key(SPECS['joint']) for f in files]
    assert keys[0] == keys[1] != keys[2]
    scratch = [Experiment(smoke.replace(panns=str(f)), tmp_path).key(SPECS['scratch']) for f in files]
    assert len(set(scratch)) == 1

@pytest.mark.parametrize('setting,kind', [('words', 'ce'), ('expert_features', 'experts'), ('text_model', 'scratch')])
def test_files_count_by_content_and_not_by_place(setting, kind, smoke, tmp_path):
    def key(name, content):
        path = tmp_path/name
        if setting == 'text_model': path.mkdir(exist_ok=True); (path/'config.json').write_text(content)
        else: path.write_text(content)
        value = f'audio={path},vggsound={path}' if setting == 'expert_features' else str(path)
        return Experiment(smoke.replace(**{setting: value}), tmp_path).key(SPECS[kind])
    first = key('a', 'one')
    assert first == key('b', 'one') != key('c', 'two')
    assert first != key('a', 'changed'), 'the same path with other content'

def test_a_folder_called_tiny_is_not_the_packaged_model(smoke, tmp_path, monkeypatch):
    before = Experiment(smoke, tmp_path).key(SPECS['scratch'])
    (tmp_path/'tiny').mkdir()
    monkeypatch.chdir(tmp_path)
    exp = Experiment(smoke, tmp_path)
    assert exp.profile.text.text_model == 'tiny' and exp.key(SPECS['scratch']) == before

def test_relative_and_absolute_paths_are_one(smoke, tmp_path, monkeypatch):
    (tmp_path/'w.txt').write_text('rain 1')
    monkeypatch.chdir(tmp_path)
    exps = [Experiment(smoke.replace(words=w), tmp_path) for w in ('w.txt', './w.txt', str(tmp_path/'w.txt'))]
    assert len({l.key(SPECS['ce']) for l in exps}) == 1
    assert resolve_paths(smoke.replace(words='w.txt')).ce.words == str(tmp_path/'w.txt')

@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp('disk')
    rows = [(f'{i}.wav', f'tone number {i}', s) for i, s in enumerate(['train'] * 4 + ['val'] * 2 + ['test'] * 2)]
    for i in range(8): soundfile.write(folder/f'{i}.wav', 0.1 * np.sin(np.arange(64000) * 0.02 * (i + 1)), 32000)
    pd.DataFrame(rows, columns=['path', 'caption', 'split']).to_csv(folder/'m.csv', index=False)
    return folder/'m.csv'

def test_the_length_of_clips_counts_on_a_corpus_from_disk(smoke, on_disk, tmp_path):
    "The hash of such a corpus does not depend on `seconds`, but the features do."
    keys = [Experiment(smoke.replace(source='manifest', seconds=s), tmp_path, data=on_disk).key(RunSpec('baseline', 'scratch')) for s in (1, 2)]
    assert keys[0] != keys[1]

# --- a profile that records which settings are read

READ, STATE = set(), dict(recording=False)

def not_recording(f):
    def g(*a, **kw):
        was, STATE['recording'] = STATE['recording'], False
        try: return f(*a, **kw)
        finally: STATE['recording'] = was
    return g

def recording(group):
    "The same group of settings, but recording which settings are read. A copy or a comparison of the whole group does not count."
    kind = type(group)
    def read(self, name):
        if STATE['recording'] and name in SETTINGS: READ.add(name)
        return kind.__getattribute__(self, name)
    whole = {m: not_recording(getattr(kind, m)) for m in '__init__ __post_init__ __eq__ __hash__ __repr__ asdict'.split()}
    return type(kind.__name__, (kind,), dict(whole, __getattribute__=read))(**group.asdict())

WITHOUT_EFFECT = {   # settings that are read but do not change the result, and why
    'batch_size': 'part of the spec, which is in the key',
    'subset': SCORED,
    'restart_schedule': 'one stage: the schedule is the same', 'remine': 'random batches are drawn again in every epoch',
    'freeze_head': 'joint training freezes nothing', 'panns': 'shows whether a tagger is needed; its content is in the key of pre-trained runs',
    'source': 'shows which corpus is opened; its content is in the key', 'n_train': 'in the content of the corpus', 'n_val': 'in the content of the corpus',
    'n_test': 'in the content of the corpus'}

def test_every_setting_that_a_run_reads_is_in_its_key(tmp_path, monkeypatch):
    monkeypatch.setattr(config, 'replace', not_recording(config.replace))
    for module in (training, baselines): # the description in a checkpoint
        monkeypatch.setattr(module, 'without_defaults', not_recording(module.without_defaults))
    smoke = get_profile('smoke').replace(n_train=32, epochs=3, seconds=1.)
    exp = Experiment(dataclasses.replace(smoke, **{g: recording(getattr(smoke, g)) for g in GROUPS}), tmp_path)
    assert exp.corpus.hash
    for name, spec in SPECS.items():
        for parent in exp.parents(spec): exp.run(parent)
        READ.clear(); STATE['recording'] = True
        try: exp.run(spec)
        finally: STATE['recording'] = False
        assert READ, name
        extra = READ - set(run_config(exp.profile, spec)) - set(WITHOUT_EFFECT)
        parents = set().union(*(set(run_config(exp.profile, q)) for q in exp.parents(spec)))
        assert extra <= parents, f'{name} reads {sorted(extra)}, which are not in its key'
