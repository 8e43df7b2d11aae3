"What a run's key stands for: every setting that is read, the content of every file, and the code of every module."
import dataclasses
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import soundfile

from cmlf import reproduce
from cmlf.config import PATH_SETTINGS, Profile, get_profile, resolve_paths
from cmlf.reproduce import Lab, Spec, relevant

import pinned

# --- the code: a module that changes raises its version, or says why results stay the same

@pytest.mark.parametrize('room', reproduce.RUN_VERSION)
def test_changed_code_has_a_new_version_or_a_reason(room):
    known = pinned.read()[room]
    assert len(known['why'].split()) >= 4, f'{room}: say in a sentence why its hash is what it is'
    assert (known['version'], known['hash']) == (reproduce.RUN_VERSION[room], pinned.code_hash(room)), (
        f'the code of {room} changed. If a run would now give other results, raise RUN_VERSION[{room!r}] in nbs/19_reproduce.ipynb. '
        f'Then: python tests/pinned.py {room} "why results change, or why they stay the same"')

def test_comments_and_docstrings_do_not_count(tmp_path):
    a = 'def f(x, # one\n      ):\n    "A sentence."\n    return x + 1\n'
    b = 'def f(x):\n    "Another one."\n    # a comment\n    return x + 1\n'
    assert pinned.hash_of(a) == pinned.hash_of(b) != pinned.hash_of(b.replace('+', '-'))
    both = a + 'def g(): return 1\n'
    assert pinned.hash_of(both, ['f']) == pinned.hash_of(a, ['f']) != pinned.hash_of(both)

# --- settings

OTHER = dict(   # another legal value of each setting
    name='other', corpus='recordings', n_train=70, n_val=18, n_test=30, subset=8, corpus_seed=1, seconds=1.5, hop=800, width=8, head_hidden=48,
    joint_dim=48, text_model='minilm', text_pool='cls', train_word_table=True, panns='FILE', dropout=0.3, block_dropout=0.3, spec_augment=False,
    epochs=4, budget='per_stage', stage_split=(2, 1, 1), keep_start=False, batch_size=16, lr=1e-3, text_lr=1e-3, schedule='constant', lr_step=3,
    restart_schedule=False, clip_norm=0., tau=0.1, loss='triplet_max', hardest=3, amp=False, curriculum=('hard', 'random', 'easy'), ancillary='text',
    remine=False, groups=False, freeze_head=True, pretrain_epochs=2, pretrain_scenes=80, pretrain_lr=1e-4, expert_features='audio=FILE,vggsound=FILE',
    expert_width=8, expert_epochs=2, words='FILE', ce_epochs=3, ce_batch_size=8, ce_lr=0.02, ce_dim=48)

CORPUS = {'corpus', 'n_train', 'n_val', 'n_test', 'corpus_seed', 'seconds'}   # of a composed corpus: in its content's hash
ALL = 'a label, and what is scored after training'
HARMLESS = {   # settings that cannot change a run of that kind, and why
    'name': ALL, 'subset': ALL,
    'panns': 'read by pre-trained runs alone', 'words': 'read by CE and MoEE alone', 'expert_features': 'read by the experts alone'}

SPECS = dict(tagger=Spec('tagger', batch_size=8), experts=Spec('experts', batch_size=8), ce=Spec('ce', batch_size=8), moee=Spec('moee', batch_size=8),
             joint=Spec('baseline', 'pretrained', batch_size=8), staged=Spec('3cmlf', 'pretrained', batch_size=8),
             mined=Spec('3cmlf', 'pretrained', True, 8), scratch=Spec('3cmlf', 'scratch', True, 8))

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

def read_by(lab, spec):
    "Settings that a run and all it builds on read."
    names = set(relevant(lab.profile, spec))
    if spec.audio == 'pretrained' and lab.profile.tagger.panns: names.add('panns')
    return names.union(*(read_by(lab, p) for p in lab.parents(spec)))

def test_there_is_another_value_for_every_setting():
    assert set(OTHER) == {f.name for f in fields(Profile)}
    assert all(getattr(get_profile('smoke'), k) != v for k, v in OTHER.items())

@pytest.mark.parametrize('setting', [k for k in OTHER if k not in ('corpus', 'panns')])
def test_a_setting_changes_the_key_of_every_run_that_reads_it(setting, smoke, any_file, tmp_path):
    before, after = (Lab(p, tmp_path) for p in (smoke, changed(smoke, setting, any_file, None)))
    for name, spec in SPECS.items():
        # Table III's rows and the baselines have the batch size in their spec, as `Lab.spec` puts it there
        now = dataclasses.replace(spec, batch_size=after.profile.batch_size)
        moved = before.key(spec) != after.key(now)
        reads = setting in read_by(after, now) or setting in CORPUS
        if setting == 'batch_size': reads = True
        assert moved == reads, (name, setting, moved)
        if not reads: assert setting in HARMLESS or setting in relevant_to_none_of(name), (name, setting)

def relevant_to_none_of(kind):
    "Settings that belong to other kinds of run."
    everything = {k for s in SPECS.values() for k in read_by(Lab(get_profile('smoke'), '.'), s)}
    return everything - read_by(Lab(get_profile('smoke'), '.'), SPECS[kind])

def test_panns_weights_count_by_content(smoke, tmp_path):
    files = [tmp_path/n for n in ('a.pth', 'b.pth', 'c.pth')]
    for f, text in zip(files, ('one', 'one', 'two')): f.write_text(text)
    keys = [Lab(smoke.replace(panns=str(f)), tmp_path).key(SPECS['joint']) for f in files]
    assert keys[0] == keys[1] != keys[2]
    scratch = [Lab(smoke.replace(panns=str(f)), tmp_path).key(SPECS['scratch']) for f in files]
    assert len(set(scratch)) == 1

@pytest.mark.parametrize('setting,kind', [('words', 'ce'), ('expert_features', 'experts'), ('text_model', 'scratch')])
def test_files_count_by_content_and_not_by_place(setting, kind, smoke, tmp_path):
    def key(name, content):
        path = tmp_path/name
        if setting == 'text_model': path.mkdir(exist_ok=True); (path/'config.json').write_text(content)
        else: path.write_text(content)
        value = f'audio={path},vggsound={path}' if setting == 'expert_features' else str(path)
        return Lab(smoke.replace(**{setting: value}), tmp_path).key(SPECS[kind])
    first = key('a', 'one')
    assert first == key('b', 'one') != key('c', 'two')
    assert first != key('a', 'changed'), 'the same path with other content'

def test_relative_and_absolute_paths_are_one(smoke, tmp_path, monkeypatch):
    (tmp_path/'w.txt').write_text('rain 1')
    monkeypatch.chdir(tmp_path)
    labs = [Lab(smoke.replace(words=w), tmp_path) for w in ('w.txt', './w.txt', str(tmp_path/'w.txt'))]
    assert len({l.key(SPECS['ce']) for l in labs}) == 1
    assert resolve_paths(smoke.replace(words='w.txt')).words == str(tmp_path/'w.txt')

@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp('disk')
    rows = [(f'{i}.wav', f'tone number {i}', s) for i, s in enumerate(['train'] * 4 + ['val'] * 2 + ['test'] * 2)]
    for i in range(8): soundfile.write(folder/f'{i}.wav', 0.1 * np.sin(np.arange(64000) * 0.02 * (i + 1)), 32000)
    pd.DataFrame(rows, columns=['path', 'caption', 'split']).to_csv(folder/'m.csv', index=False)
    return folder/'m.csv'

def test_the_length_of_clips_counts_on_a_corpus_from_disk(smoke, on_disk, tmp_path):
    "The corpus's hash does not hold it there: 1 s and 2 s of one manifest are other features."
    keys = [Lab(smoke.replace(corpus='manifest', seconds=s), tmp_path, data=on_disk).key(Spec('baseline', 'scratch')) for s in (1, 2)]
    assert keys[0] != keys[1]

# --- what is read: a profile that watches

class Watched(Profile):
    "A profile that notes which settings are read, except where all are (a copy, a comparison, a record)."
    seen, watching = set(), False
    def __getattribute__(self, name):
        if Watched.watching and name in Profile.__dataclass_fields__: Watched.seen.add(name)
        return super().__getattribute__(name)

def unwatched(f):
    def g(*a, **kw):
        was, Watched.watching = Watched.watching, False
        try: return f(*a, **kw)
        finally: Watched.watching = was
    return g

for method in '__init__ __post_init__ __eq__ __hash__ __repr__ replace asdict'.split(): setattr(Watched, method, unwatched(getattr(Profile, method)))

IN_VAIN = {   # read without effect, and why
    'name': 'folders and log lines', 'batch_size': 'stands in the spec, which the key holds',
    'subset': ALL,
    'restart_schedule': 'one stage: the schedule is the same', 'remine': 'random batches are drawn anew each epoch in any case',
    'freeze_head': 'joint training freezes nothing', 'panns': 'whether a tagger is needed; its content is in the key of pre-trained runs',
    'corpus': 'which corpus is opened; its content is in the key', 'n_train': 'in the content of the corpus', 'n_val': 'in the content of the corpus',
    'n_test': 'in the content of the corpus'}

def test_a_run_reads_no_setting_that_its_key_does_not_hold(tmp_path):
    p = Watched(**get_profile('smoke').replace(n_train=32, epochs=3, seconds=1.).asdict())
    lab = Lab(p, tmp_path)
    assert isinstance(lab.profile, Watched)
    Watched.watching = True
    try: lab.corpus.hash
    finally: Watched.watching = False
    for name, spec in SPECS.items():
        for parent in lab.parents(spec): lab.run(parent)
        Watched.seen, Watched.watching = set(), True
        try: lab.run(spec)
        finally: Watched.watching = False
        assert Watched.seen, name
        extra = Watched.seen - set(relevant(lab.profile, spec)) - set(IN_VAIN)
        parents = set().union(*(set(relevant(lab.profile, q)) for q in lab.parents(spec)))
        assert extra <= parents, f'{name} reads {sorted(extra)}, which its key does not hold'
