"""Three kinds of dual encoder in one loop: frozen parts keep their bits, runs resume bit for bit, checkpoints give the vectors that their
own code gives, and ancillary vectors come from any saved model or file."""
import json, shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import transformers
from torch.nn.functional import normalize

from cmlf.appendix.bert import load_bert, packaged_minilm, tiny_bert
from cmlf.appendix.checkpoints import panns_front_end
from cmlf.appendix.models import (AudioSide, ClapFrontEnd, TextSide, TwoSides, clap_text, load_clap, new_audio_config, new_clap_audio,
                                  new_extractor)
from cmlf.appendix.packing import last_states
from cmlf.appendix.panns import Cnn14
from cmlf.config import get_profile
from cmlf.core import CmlfError, read_json, seed_everything, write_json
from cmlf.encoders import DualEncoder, TextEncoder
from cmlf.experiments import Experiment, evaluate_on, train_on
from cmlf.features import LogMel
from cmlf.runs import RunSpec
from cmlf.training import PairedSplit, Stage, Tokens, Trainer, embed
from command import cmlf

KINDS = 'resnet38', 'cnn14', 'clap'
SOUNDS = ['rain', 'a dog', 'a bell', 'wind', 'a car', 'birds', 'a drum', 'water', 'a voice', 'steps', 'a horn', 'a saw']
CAPTIONS = [f'{sound} far away' if i % 3 else sound for i, sound in enumerate(SOUNDS)]

def tiny(kind, **settings): return get_profile('smoke', dict(encoder=kind, width=2, batch_size=4) | settings)

def new(kind, seed=0, **settings):
    seed_everything(seed)
    return DualEncoder.from_profile(tiny(kind, **settings))

def split(model, n=8, seed=0):
    "Random inputs, as wide as those of the front end, and captions of several lengths."
    x = torch.randn(n, 64, model.front_end(640).n_mels, generator=torch.Generator().manual_seed(seed)) * 10 - 40
    return PairedSplit(x, Tokens(model.text, CAPTIONS[:n]), np.arange(n), np.arange(n))

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

def state(module): return {k: v.clone() for k, v in module.state_dict().items()}

def statistics(model): return {k: v for k, v in state(model.audio).items() if 'running_' in k or 'num_batches' in k}

@pytest.fixture(scope='module', params=KINDS)
def kind(request): return request.param


# --- what every kind does

def test_a_model_has_what_training_asks_for(kind):
    model = new(kind)
    assert isinstance(model, TwoSides) and isinstance(model.audio, AudioSide) and isinstance(model.text, TextSide)
    audio, text = embed(model, split(model))
    assert audio.shape == text.shape == (8, 32) and audio.isfinite().all() and text.isfinite().all()
    assert model.audio(split(model).store).shape == (8, model.audio.n_out)

def test_the_front_end_gives_what_its_store_needs(kind):
    front, wave = new(kind).front_end(640), torch.randn(3, 32000 * 2) / 10
    assert front(wave).shape == (3, front.frames(wave.shape[1]), front.n_mels) and front.sample_rate == 32000
    assert torch.allclose(front(wave)[1:], front(wave[1:]), atol=1e-5)
    json.dumps(front.settings) # part of a key
    assert (front.settings == LogMel(640).settings) == (kind != 'clap')

def test_from_profile_is_deterministic(kind):
    assert same(new(kind).state_dict(), new(kind).state_dict())
    assert not same(new(kind).state_dict(), new(kind, 1).state_dict())

@pytest.mark.parametrize('which, frozen', [('audio', 'text'), ('text', 'audio'), ('both', '')])
@pytest.mark.parametrize('freeze_head', [False, True])
def test_frozen_parts_get_no_gradient_and_keep_their_bits(kind, which, frozen, freeze_head):
    model = new(kind, train_word_table=True).train_only(which, freeze_head)
    before, pairs = state(model), split(model)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=.1)
    (torch.mul(*model((pairs.store, pairs.tokens[torch.arange(8)]))).sum()).backward()
    still = {frozen} | ({f'{frozen}_head'} if freeze_head else set())
    for name, p in model.named_parameters():
        if name.split('.')[0] in still: assert p.grad is None, name
        else: assert p.grad is not None, name
    optimiser.step()
    changed = {k.split('.')[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'audio', 'audio_head', 'text', 'text_head'} - still

@pytest.mark.parametrize('how, moves', [
    (dict(which='both'), True), (dict(which='both', norm_eval=True), False), (dict(which='audio'), True),
    (dict(which='text'), False), (dict(which='text', frozen_eval=False), True)])
def test_batch_statistics_move_only_where_they_are_asked_to(kind, how, moves):
    model = new(kind).train_only(**how).eval().train() # as after a validation
    before = statistics(model)
    assert before
    model.audio(split(model).store)
    after = statistics(model)
    assert all(torch.equal(after[k], v) != moves for k, v in before.items())

def test_a_frozen_audio_encoder_gives_a_clip_the_same_vector_in_any_batch(kind):
    model = new(kind, dropout=.5).train_only('text')
    x = split(model).store
    with torch.no_grad(): assert torch.allclose(model.audio(x)[3:5], model.audio(x[3:5]), atol=1e-4)

def test_padding_changes_no_text_vector(kind):
    model = new(kind).eval()
    captions = ['rain', 'a dog barks loudly in a garden while rain falls on the roof of a car that is far away']
    with torch.no_grad():
        together = model.text(model.text.tokenize(captions))
        alone = torch.cat([model.text(model.text.tokenize([c])) for c in captions])
    assert torch.allclose(together, alone, atol=1e-5)

def test_a_saved_model_gives_the_same_vectors(kind, tmp_path):
    model = new(kind)
    for v in model.state_dict().values():
        if v.is_floating_point(): v.add_(torch.rand_like(v) * .1)
    want = embed(model, split(model))
    model.train_only('audio').save(tmp_path/'a')
    found = DualEncoder.load(shutil.move(tmp_path/'a', tmp_path/'b'))
    assert not found.training and all(map(torch.equal, embed(found, split(found)), want))
    assert same(found.state_dict(), model.state_dict()) and found.front_end(640).settings == model.front_end(640).settings
    trainable = lambda m: {n for n, p in m.train_only('both').named_parameters() if p.requires_grad}
    assert trainable(found) == trainable(model)
    found.save(tmp_path/'c')
    names = lambda folder: sorted(f.relative_to(folder).as_posix() for f in folder.rglob('*') if f.is_file())
    assert names(tmp_path/'b') == names(tmp_path/'c')
    assert read_json(tmp_path/'b'/'encoders.json') == read_json(tmp_path/'c'/'encoders.json')

def test_damaged_files_of_every_kind_are_named(kind, tmp_path):
    new(kind).save(tmp_path/'m')
    for name in read_json(tmp_path/'m'/'encoders.json')['files']:
        copy = shutil.copytree(tmp_path/'m', tmp_path/'copy', dirs_exist_ok=True)
        (copy/name).write_bytes((copy/name).read_bytes()[:-9])
        with pytest.raises(CmlfError, match='copy the whole folder again, or save the model again') as e: DualEncoder.load(copy)
        assert str(e.value).startswith(f'{copy/name}: ') and '\n' not in str(e.value)

class Stop(Exception): pass

def trainer(kind, checkpoint=None, stop=0, key='', **settings):
    "Three stages, the first and the last on mined batches; after `stop` lines of its log it is interrupted."
    model, lines = new(kind, train_word_table=False, **settings), []
    def log(line):
        lines.append(line)
        if len(lines) == stop: raise Stop
    stages = [Stage('easy', 'audio', 2), Stage('random', 'text', 1), Stage('hard', 'both', 2, True)]
    vectors = np.random.default_rng(0).normal(size=(8, 5))
    return Trainer(model, split(model, 8), split(model, 6, 1), tiny(kind, **settings), stages, 3, vectors, split(model, 5, 2), checkpoint,
                   save_every=0., log=log, key=key)

def test_interrupted_training_resumes_bit_for_bit(kind, tmp_path):
    whole = trainer(kind)
    whole.fit()
    for stop in (3, 7): # in the second epoch of stages 1 and 3 (a resumed run logs one more line)
        with pytest.raises(Stop): trainer(kind, tmp_path/'state.pt', stop).fit()
    part = trainer(kind, tmp_path/'state.pt')
    part.fit()
    assert same(part.model.state_dict(), whole.model.state_dict())
    for a, b in zip(part.stage_outputs, whole.stage_outputs, strict=True):
        assert torch.equal(a['audio'], b['audio']) and torch.equal(a['text'], b['text'])
    assert [h['val'] for h in part.history] == [h['val'] for h in whole.history]

def test_results_of_a_resumed_run_stay_on_the_cpu(kind, tmp_path):
    "As in a run that was not interrupted, whatever device trains."
    with pytest.raises(Stop): trainer(kind, tmp_path, 7).fit()
    resumed = trainer(kind, tmp_path)
    resumed.dev = torch.device('meta')
    resumed.resume()
    kept = [x for o in resumed.stage_outputs for x in o.values() if torch.is_tensor(x)]
    assert kept and all(x.device.type == 'cpu' for x in kept)

def test_a_run_with_a_key_resumes_whatever_else_changes(tmp_path):
    with pytest.raises(Stop): trainer('cnn14', tmp_path, 3, key='k').fit()
    assert trainer('cnn14', tmp_path, key='k', ce_epochs=7).resume()['epoch'] == 1
    lines, other = [], trainer('cnn14', tmp_path, key='another')
    other.checkpoint.say = lines.append
    assert other.resume() is None and 'the run starts again' in lines[0]
    with pytest.raises(CmlfError, match='another run'): trainer('cnn14', tmp_path).resume()

def test_a_frozen_encoder_is_computed_once_and_gives_the_same(kind):
    "Cached outputs of a frozen encoder, and an encoder that is frozen but computed in each step, without dropout."
    cached, again = trainer(kind, dropout=0., block_dropout=0.), trainer(kind, dropout=0., block_dropout=0.)
    again.stages = cached.stages = [Stage('random', 'text', 2)]
    def without_cache(self=again):
        Trainer.start_stage(self)
        self.inputs = self.train
    again.start_stage = without_cache
    cached.fit(); again.fit()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(embed(cached.model, cached.train), embed(again.model, again.train)))

def test_training_lowers_the_loss(kind):
    t = trainer(kind, lr=1e-3, text_lr=1e-3, dropout=0., block_dropout=0., spec_augment=False, schedule='constant')
    t.stages = [Stage('random', 'both', 20)]
    losses = [h['loss'] for h in t.fit()]
    assert losses[-1] < .7 * losses[1]


def test_every_kind_trains_in_bf16(kind):
    model = new(kind).train_only('both')
    pairs = split(model)
    with torch.autocast('cpu', torch.bfloat16): x, y = model((pairs.store, pairs.tokens[torch.arange(8)]))
    (x * y).sum().backward()
    assert x.dtype == y.dtype == torch.float32 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- the kind of a saved model

def test_folders_without_a_kind_hold_a_resnet38(tmp_path):
    model = new('resnet38').eval()
    model.save(tmp_path)
    found = read_json(tmp_path/'encoders.json')
    assert found.pop('kind') == 'resnet38'
    write_json(tmp_path/'encoders.json', found)
    assert same(DualEncoder.load(tmp_path).state_dict(), model.state_dict())

@pytest.mark.parametrize('changes, match', [
    (dict(kind='cnn41'), "unknown kind in .*encoders.json: 'cnn41'; did you mean 'cnn14'"), (dict(kind=3), 'kind=3 is not usable'),
    (dict(kind='resnet38'), 'should hold width, dropout, block_dropout'), (dict(kind='clap'), 'should hold'),
    (dict(joint_dim=9), 'does not fit the model')])
def test_another_kind_is_one_clear_error(tmp_path, changes, match):
    new('cnn14').save(tmp_path)
    write_json(tmp_path/'encoders.json', read_json(tmp_path/'encoders.json') | changes)
    with pytest.raises(CmlfError, match=match) as e: DualEncoder.load(tmp_path)
    assert '\n' not in str(e.value)

def test_sizes_of_clap_are_those_of_its_config(tmp_path):
    new('clap').save(tmp_path)
    write_json(tmp_path/'encoders.json', read_json(tmp_path/'encoders.json') | dict(joint_dim=9))
    with pytest.raises(CmlfError, match='sizes of the heads'): DualEncoder.load(tmp_path)

@pytest.mark.parametrize('value, match', [('resnet83', "did you mean 'resnet38'"), ('clap:', 'clap:FOLDER or clap:HUB_NAME'),
                                          ('cnn14:x', 'clap:FOLDER or clap:HUB_NAME'), ('', 'unknown encoder')])
def test_an_unknown_encoder_is_one_clear_error(value, match):
    with pytest.raises(CmlfError, match=match): get_profile('smoke', [f'encoder={value}'])


# --- CNN14: the format of PANNs' file, written down independently of our encoder

def cnn14_entries(w):
    torch.manual_seed(w)
    sizes = [1] + [w * 2**i for i in range(6)]
    shapes = dict(bn0=64)
    for i, (a, b) in enumerate(zip(sizes, sizes[1:]), 1):
        shapes |= {f'conv_block{i}.conv1.weight': (b, a, 3, 3), f'conv_block{i}.conv2.weight': (b, b, 3, 3), f'conv_block{i}.bn1': b,
                   f'conv_block{i}.bn2': b}
    shapes |= {'fc1.weight': (32 * w, 32 * w), 'fc1.bias': (32 * w,), 'fc_audioset.weight': (527, 32 * w), 'fc_audioset.bias': (527,)}
    found = {}
    for name, shape in shapes.items():
        if isinstance(shape, tuple): found[name] = torch.randn(shape) / 9; continue
        found |= {f'{name}.{k}': torch.rand(shape) + .5 for k in ('weight', 'bias', 'running_mean', 'running_var')}
        found[f'{name}.num_batches_tracked'] = torch.tensor(9)
    return found | panns_front_end()

def panns_cnn14(m, x):
    "CNN14 as PANNs' code computes it, up to the sum of maximum and mean."
    F = torch.nn.functional
    bn = lambda x, n: F.batch_norm(x, m[f'{n}.running_mean'], m[f'{n}.running_var'], m[f'{n}.weight'], m[f'{n}.bias'])
    x = bn(x[:, None].transpose(1, 3), 'bn0').transpose(1, 3)
    for i in range(1, 7):
        for j in (1, 2): x = F.relu(bn(F.conv2d(x, m[f'conv_block{i}.conv{j}.weight'], padding=1), f'conv_block{i}.bn{j}'))
        if i < 6: x = F.avg_pool2d(x, 2)
    x = x.mean(3)
    return x.max(2)[0] + x.mean(2)

@pytest.mark.parametrize('legacy', [False, True])
def test_a_panns_file_of_cnn14_gives_the_outputs_of_panns(tmp_path, legacy):
    m = cnn14_entries(2)
    sampler = dict(indexes_per_class=[np.arange(9)], queue=[1, 0])
    torch.save(dict(iteration=600000, model=m, sampler=sampler), tmp_path/'Cnn14.pth', _use_new_zipfile_serialization=not legacy)
    encoder, x = Cnn14(2).load_panns(tmp_path/'Cnn14.pth').eval(), torch.randn(3, 101, 64) * 10 - 40
    with torch.no_grad(): torch.testing.assert_close(encoder(x), panns_cnn14(m, x), rtol=1e-4, atol=1e-4)

def test_a_file_of_the_other_network_is_one_clear_error(tmp_path):
    torch.save(dict(model=cnn14_entries(2)), tmp_path/'cnn14.pth')
    model = new('resnet38')
    with pytest.raises(CmlfError, match=r'not a PANNs ResNet38 of width 2, give ResNet38_mAP=0.434.pth'):
        model.audio.load_panns(tmp_path/'cnn14.pth')
    with pytest.raises(CmlfError, match='not a PANNs CNN14 of width 4, set width=2'): Cnn14(4).load_panns(tmp_path/'cnn14.pth')
    with pytest.raises(CmlfError, match=r'no such file; download Cnn14_mAP=0.431.pth'): Cnn14(4).load_panns(tmp_path/'none.pth')

@pytest.mark.parametrize('frames, bands', [(31, 64), (101, 63)])
def test_cnn14_refuses_what_is_no_log_mel(frames, bands):
    with pytest.raises(CmlfError, match='should be|too short for CNN14'): Cnn14(2)(torch.zeros(2, frames, bands))


# --- CLAP: a small model in the files of save_pretrained

def clap_folder(path, tokenizer=None, fusion=False, **text):
    seed_everything(1)
    words, bert = tiny_bert()
    extractor = new_extractor(2, 640)
    if fusion: extractor = transformers.ClapFeatureExtractor(hop_length=960, max_length_s=2, truncation='fusion')
    audio = new_audio_config(2, 101, 24).to_dict() | dict(enable_fusion=fusion)
    config = transformers.ClapConfig(audio_config=audio, text_config=clap_text(bert, 24).config.to_dict() | text, projection_dim=24)
    model = transformers.ClapModel(config).eval()
    for k, v in model.state_dict().items():
        if v.is_floating_point() and 'logit' not in k: v.add_(torch.rand_like(v) * .05)
    for part in (model, tokenizer or words, extractor): part.save_pretrained(path)
    return path

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return clap_folder(tmp_path_factory.mktemp('clap'))

def theirs(folder, wave, captions):
    "What transformers gives, from 48 kHz samples and sentences."
    import librosa
    model, extractor = transformers.ClapModel.from_pretrained(folder).eval(), transformers.ClapFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    wave = [librosa.resample(w, orig_sr=32000, target_sr=48000, res_type='soxr_hq') for w in wave.numpy()]
    x = extractor(wave, sampling_rate=48000, return_tensors='pt')['input_features']
    tokens = tokenizer(captions, padding=True, return_tensors='pt')
    with torch.no_grad():
        audio = model.get_audio_features(x, is_longer=torch.zeros(len(x), 1, dtype=torch.bool))
        text = model.get_text_features(tokens['input_ids'], tokens['attention_mask'])
    return [getattr(f, 'pooler_output', f) for f in (audio, text)]

@pytest.mark.parametrize('fusion', [False, True])
@pytest.mark.parametrize('seconds', [1.3, 2])
def test_a_clap_folder_gives_the_vectors_of_transformers(tmp_path, fusion, seconds):
    path, captions = clap_folder(tmp_path/'m', fusion=fusion), ['rain', 'a dog barks at a car', 'wind in the trees']
    model, wave = new(f'clap:{path}').eval(), torch.randn(3, int(32000 * seconds)) / 10
    want = theirs(path, wave, captions)
    with torch.no_grad():
        found = model.embed_audio(model.front_end(640)(wave)), model.embed_text(model.text.tokenize(captions))
    for a, b in zip(found, want): torch.testing.assert_close(normalize(a), b, rtol=0, atol=1e-5)
    model.save(tmp_path/'saved')
    again = DualEncoder.load(tmp_path/'saved')
    with torch.no_grad(): assert torch.equal(again.embed_audio(again.front_end()(wave)), found[0])
    assert again.state_dict().keys() == model.state_dict().keys()

def test_layers_for_longer_clips_are_not_trained(tmp_path):
    model = new(f'clap:{clap_folder(tmp_path, fusion=True)}').train_only('both')
    never = {n for n, p in model.audio.named_parameters() if not p.requires_grad}
    assert never and all('fusion_model' in n or 'mel_conv2d' in n for n in never)
    pairs = split(model)
    torch.mul(*model((pairs.store, pairs.tokens[torch.arange(8)]))).sum().backward()
    assert all(p.grad is not None for p in model.audio.parameters() if p.requires_grad)

def test_a_long_clip_is_cut_and_its_features_are_not_drawn(tmp_path):
    for path in (clap_folder(tmp_path/'a'), clap_folder(tmp_path/'b', fusion=True)):
        front, wave = DualEncoder.from_profile(tiny(f'clap:{path}')).front_end(), torch.randn(1, 32000 * 3) / 10
        assert torch.equal(front(wave), front(wave[:, :64000]))

@pytest.mark.parametrize('frames, text', [(101, True), (257, False)])
def test_sizes_that_do_not_fit_are_one_clear_error(folder, tmp_path, frames, text):
    shutil.copytree(folder, tmp_path/'m')
    name, change = ('config.json', None) if text else ('preprocessor_config.json', dict(hop_length=240, max_length_s=2))
    found = read_json(tmp_path/'m'/name)
    if text: found['text_config']['vocab_size'] = 99
    write_json(tmp_path/'m'/name, found | (change or {}))
    with pytest.raises(CmlfError, match='word table|cannot be loaded|takes 64 bands and 256 frames') as e: new(f'clap:{tmp_path/"m"}')
    assert '\n' not in str(e.value)

def test_a_clap_without_some_weights_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, tmp_path/'m')
    weights = load_file(tmp_path/'m'/'model.safetensors')
    for gone in ('audio_model.audio_encoder.batch_norm.running_mean', 'text_model.pooler.dense.weight'):
        save_file({k: v for k, v in weights.items() if k != gone}, tmp_path/'m'/'model.safetensors', metadata=dict(format='pt'))
        with pytest.raises(CmlfError, match=rf'weights missing: 1 \({gone}\)'): load_clap(tmp_path/'m')

def test_other_models_and_missing_ones_are_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(CmlfError, match="'bert'. Known: clap"): new(f'clap:{packaged_minilm()}')
    with pytest.raises(CmlfError, match='CLAP model .* no such folder'): new(f'clap:{tmp_path}/none')
    with pytest.raises(CmlfError, match='run `hf download no/clap`'): new('clap:no/clap')

@pytest.mark.parametrize('settings', [dict(text_layers=1), dict(text_frozen=1), dict(train_word_table=True), dict(dropout=.3)])
def test_settings_of_the_text_encoder_count_for_clap(folder, settings):
    for model in (new('clap', **settings), new(f'clap:{folder}', **settings)):
        text = model.text
        assert len(text.model.encoder.layer) == settings.get('text_layers', 2) and text.frozen == settings.get('text_frozen', 0)
        assert text.model.get_input_embeddings().weight.requires_grad == settings.get('train_word_table', False)
        assert {m.p for m in text.modules() if isinstance(m, torch.nn.Dropout)} == {settings.get('dropout', .1)}
        assert model.audio.model.config.hidden_dropout_prob == settings.get('dropout', .1)

def test_half_precision_and_fusion_layers_are_read_as_float32(folder, tmp_path):
    shutil.copytree(folder, tmp_path/'m')
    transformers.ClapModel.from_pretrained(folder).half().save_pretrained(tmp_path/'m')
    assert {p.dtype for p in new(f'clap:{tmp_path/"m"}').parameters()} == {torch.float32}

@pytest.mark.parametrize('type', ['bert', 'roberta'])
def test_clap_takes_the_weights_of_a_text_model(type, tmp_path):
    if type == 'bert': _, bert = load_bert(packaged_minilm())
    else:
        config = transformers.RobertaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                            max_position_embeddings=40)
        bert = transformers.RobertaModel(config, add_pooling_layer=False)
    text = clap_text(bert.eval()).eval()
    ids = torch.arange(5, 35).view(3, 10)
    tokens = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        a, b = last_states(text, tokens), bert(**tokens).last_hidden_state
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
        torch.testing.assert_close(text(**tokens).last_hidden_state, b, rtol=0, atol=2e-5)

def test_dropout_of_a_model_in_training_does_not_change_its_heads():
    model = new('clap', dropout=.5).train_only('audio')
    tokens = model.text.tokenize(['rain'])
    assert torch.equal(model.text(tokens), model.text(tokens)) # frozen, so in eval mode

@pytest.mark.parametrize('seconds, hop', [(.5, 640), (1.5, 640), (4, 640), (2, 321), (10, 320), (12, 320)])
def test_a_new_clap_fits_clips_of_any_length(seconds, hop):
    audio = new_clap_audio(1, seconds, hop).eval()
    front = audio.front_end()
    x = front(torch.randn(1, int(32000 * seconds)) / 10)
    assert x.shape == (1, front.frames(), 64)
    with torch.no_grad(): assert audio(x).shape == (1, audio.n_out) and audio(x).isfinite().all()


# --- whole runs

@pytest.fixture(scope='module')
def exp(tmp_path_factory):
    settings = dict(n_train=16, n_val=6, n_test=8, width=2, batch_size=4, seconds=1., epochs=3, pretrain_scenes=16)
    return Experiment(get_profile('smoke', settings), tmp_path_factory.mktemp('runs'))

def trained(exp, *spec, **more): return exp.run(exp.spec(*spec, **more))

@pytest.mark.parametrize('encoder', ['cnn14', 'clap'])
def test_every_system_trains_with_another_encoder(exp, encoder):
    changes = f'encoder={encoder}'
    specs = [exp.spec('baseline', 'scratch', changes=changes), exp.spec('3cmlf', 'scratch', changes=changes),
             exp.spec('3cmlf', 'scratch', True, changes=changes), exp.spec('stage3', 'scratch', True, changes=changes),
             exp.spec('3cmlf', 'pretrained', changes=changes)]
    assert len({exp.key(s) for s in specs}) == 5
    tagger, = (s for s in exp.parents(specs[-1]) if s.system == 'tagger')
    assert tagger.changes == changes
    exp.train_all(specs)
    for spec in specs:
        run = exp.run(spec)
        assert read_json(run.folder/'encoders.json')['kind'] == encoder and f'encoder={encoder}' in run.folder.name
        assert np.isfinite(run.arrays['audio_3' if spec.system != 'baseline' else 'audio_1']).all()
    whole, part = (exp.run(s).arrays for s in specs[2:4]) # stage 3 alone is the third stage of the whole run
    assert np.array_equal(whole['audio_3'], part['audio_3']) and np.array_equal(whole['text_3'], part['text_3'])

def test_stores_of_other_front_ends_have_other_files(exp):
    before = set((exp.runs/'features').glob('*.npy'))
    a, b, c = (exp.pairs('val', new(k, seconds=1.)) for k in KINDS)
    assert a is b and c is not a and c.store.path != a.store.path and before <= set((exp.runs/'features').glob('*.npy'))
    assert a.store.path.name.startswith('log-mel-') and len(c) == len(a)

def test_captions_are_tokenised_for_each_tokenizer(exp, folder, tmp_path):
    words = transformers.AutoTokenizer.from_pretrained(packaged_minilm())
    words.add_tokens(['rain'])
    path = clap_folder(tmp_path/'m', words, vocab_size=len(words))
    a, b = (exp.pairs('val', new(k, seconds=1.)) for k in ('clap', f'clap:{path}'))
    assert a.tokens is not b.tokens and exp.pairs('val', new('cnn14', seconds=1.)).tokens is a.tokens

def test_prepare_checks_and_stores_what_each_run_needs(exp, tmp_path):
    fresh = Experiment(exp.profile, tmp_path)
    fresh.prepare([exp.spec('baseline', 'scratch', changes=f'encoder={k}') for k in KINDS])
    assert len(list((tmp_path/'features').glob('*.npy'))) == 2 * 3

def test_scratch_and_pretrained_runs_of_a_published_clap(exp, folder):
    change = f'encoder=clap:{folder}'
    old, new_ = (exp.new_model(exp.spec('baseline', a, changes=change)) for a in ('pretrained', 'scratch'))
    published = load_clap(folder)[0]
    assert same(old.audio.model.state_dict(), published.audio_model.state_dict())
    assert same(old.text.model.state_dict(), published.text_model.state_dict()) and same(old.text.state_dict(), new_.text.state_dict())
    weight = 'model.audio_encoder.patch_embed.proj.weight'
    assert not torch.equal(old.audio.state_dict()[weight], new_.audio.state_dict()[weight])
    assert not exp.parents(exp.spec('baseline', 'pretrained', changes=change)) # it needs no tagger
    run = trained(exp, 'baseline', 'pretrained', changes=change)
    assert '/' not in run.folder.name.removeprefix(str(exp.runs)) and run.folder.parent == exp.runs/'smoke'

def test_a_published_clap_counts_by_its_content(exp, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path/'copy')
    key = lambda path: exp.key(exp.spec('baseline', 'scratch', changes=f'encoder=clap:{path}'))
    before = key(folder)
    assert before == key(copy) != exp.key(exp.spec('baseline', 'scratch', changes='encoder=clap'))
    write_json(copy/'config.json', read_json(copy/'config.json') | dict(note=1))
    assert Experiment(exp.profile, exp.runs).key(exp.spec('baseline', 'scratch', changes=f'encoder=clap:{copy}')) != before

def test_panns_weights_need_a_network_of_panns(exp, tmp_path):
    torch.save(dict(model=cnn14_entries(2)), tmp_path/'cnn14.pth')
    spec = lambda k: exp.spec('baseline', 'pretrained', changes=f'encoder={k} panns={tmp_path}/cnn14.pth')
    weights = exp.new_model(spec('cnn14')).audio.state_dict()
    assert torch.equal(weights['conv_block6.conv2.weight'], cnn14_entries(2)['conv_block6.conv2.weight'])
    with pytest.raises(CmlfError, match='PANNs published weights of resnet38 and cnn14, not of ClapAudio'): exp.new_model(spec('clap'))
    assert exp.key(spec('cnn14')) != exp.key(exp.spec('baseline', 'pretrained', changes='encoder=cnn14'))

@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')
    names = ['train'] * 8 + ['val'] * 2 + ['test'] * 2
    for i in range(12): soundfile.write(path/f'{i}.wav', .1 * np.sin(np.arange(32000) * .02 * (i + 1)), 32000)
    rows = [(f'{i}.wav', caption, s) for i, (caption, s) in enumerate(zip(CAPTIONS, names))]
    pd.DataFrame(rows, columns=['path', 'caption', 'split']).to_csv(path/'m.csv', index=False)
    return path/'m.csv'

@pytest.mark.parametrize('encoder', ['cnn14', 'clap', 'clap:FOLDER'])
def test_train_and_evaluate_on_own_sounds(manifest, folder, tmp_path, encoder):
    copy = shutil.copytree(folder, tmp_path/'clap')
    profile = tiny(encoder.replace('FOLDER', str(copy)), seconds=1.)
    run = train_on(manifest, profile, tmp_path/'run', '3cmlf', chm=encoder == 'clap')
    assert run.metadata['spec']['audio'] == ('pretrained' if encoder == 'clap:FOLDER' else 'scratch')
    shutil.rmtree(copy) # a saved model does not need it any more
    found = evaluate_on(run, manifest)
    assert found['coverage']['coverage'] == '2 of 2 clips'
    assert found['t2a']['R@1'] == run.metadata['test'][-1][0]

def test_the_commands_take_the_setting(manifest, tmp_path):
    done = cmlf('train', '--data', manifest, '--profile', 'smoke', '--set', 'encoder=cnn14', '--set', 'width=2', '--set', 'seconds=1',
                '--out', tmp_path/'run', '--no-chm')
    assert done.returncode == 0, done.stderr
    done = cmlf('evaluate', tmp_path/'run', '--data', manifest, '--json')
    assert done.returncode == 0 and json.loads(done.stdout)['coverage']['coverage'] == '2 of 2 clips', done.stderr

def test_a_profile_with_another_encoder_makes_the_rows_of_a_table(tmp_path):
    "As `cmlf reproduce --set encoder=clap` does: its taggers and baselines have that encoder too."
    exp = Experiment(get_profile('smoke', dict(encoder='clap', n_train=16, n_val=6, n_test=8, width=2, batch_size=4, seconds=1.,
                                               pretrain_scenes=16)), tmp_path)
    exp.train_all([exp.spec('3cmlf', 'pretrained', True)])
    kinds = {f.parent.name.split('-')[0]: read_json(f)['kind'] for f in (tmp_path/'smoke').rglob('encoders.json')}
    assert kinds == {'baseline': 'clap', '3cmlf': 'clap'} and len(list((tmp_path/'smoke').glob('tagger*'))) >= 1


# --- ancillary vectors from elsewhere

def mined(exp, source, **more): return exp.spec('3cmlf', 'scratch', True, changes=f'vectors_from={source}', **more)

def test_vectors_of_any_saved_model(exp, tmp_path):
    for kind in KINDS:
        model = new(kind, seconds=1.)
        model.save(tmp_path/kind)
        e, _ = exp.vectors(mined(exp, tmp_path/kind))
        assert e.shape == (16, 32) and np.allclose(np.linalg.norm(e, axis=1), 1, atol=1e-5)
        pairs = exp.pairs('train', model)
        audio, text = (normalize(x) for x in embed(model, pairs))
        mean = normalize(torch.zeros_like(audio).index_add_(0, torch.as_tensor(pairs.owner), text))
        assert np.allclose(e, normalize(audio + mean).numpy(), atol=1e-5)

def test_a_run_mines_the_vectors_of_a_file(exp, tmp_path):
    e = np.random.default_rng(0).normal(size=(16, 7))
    np.save(tmp_path/'e.npy', e)
    spec = mined(exp, tmp_path/'e.npy')
    assert np.allclose(exp.vectors(spec)[0], e / np.linalg.norm(e, axis=1, keepdims=True), atol=1e-6)
    assert not exp.parents(spec) # no baseline is trained
    run = exp.run(spec)
    assert run.folder.name.startswith('3cmlf-scratch-chm-vectors_from=e.npy-') and run.metadata['vector_minutes'] == 0

def test_vectors_count_by_content_and_not_by_place(exp, tmp_path):
    e = np.random.default_rng(0).normal(size=(16, 7))
    for name, x in dict(a=e, b=e, c=-e).items(): np.save(tmp_path/f'{name}.npy', x)
    keys = [exp.key(mined(exp, tmp_path/f'{n}.npy')) for n in 'abc']
    assert keys[0] == keys[1] != keys[2] != exp.key(exp.spec('3cmlf', 'scratch', True))
    new('cnn14').save(tmp_path/'m')
    shutil.copytree(tmp_path/'m', tmp_path/'n')
    (tmp_path/'n'/'run.json').write_text('{}') # results beside the model do not count
    new('cnn14', 1).save(tmp_path/'o')
    keys = [exp.key(mined(exp, tmp_path/n)) for n in 'mno']
    assert keys[0] == keys[1] != keys[2]

def test_vectors_of_a_model_that_was_trained_with_another_hop(exp, tmp_path):
    model = new('cnn14', seconds=1.)
    model.save(tmp_path/'m')
    write_json(tmp_path/'m'/'run.json', dict(profile=exp.profile.replace(hop=320).asdict()))
    a, b = (exp.given_vectors(str(tmp_path/'m'), w)[0] for w in ('audio', 'text'))
    audio = normalize(embed(model, exp.pairs('train', model, 320))[0]).numpy()
    assert np.allclose(a, audio, atol=1e-5) and not np.allclose(a, b)
    assert exp.pairs('train', model, 320).store.frames == 101 and exp.pairs('train', model).store.frames == 51

@pytest.mark.parametrize('x, match', [
    (np.ones((15, 4)), '15 vectors for 16 training clips; give one for each'), (np.ones(16), 'e.npy: '),
    (np.full((16, 4), np.nan), 'e.npy: '), (np.array(['a'] * 16), 'e.npy: ')])
def test_vectors_that_do_not_fit_are_one_clear_error(exp, tmp_path, x, match):
    np.save(tmp_path/'e.npy', x)
    with pytest.raises(CmlfError, match=match) as e: exp.vectors(mined(exp, tmp_path/'e.npy'))
    assert 'e.npy' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('value, match', [('strat', "did you mean 'start'"), ('/no/such/e.npy', 'no such file'), ('/no/such', 'no such file'),
                                          ('FOLDER', 'encoders.json.*no such file')])
def test_sources_that_are_not_there_are_one_clear_error(tmp_path, value, match):
    with pytest.raises(CmlfError, match=match): Experiment(tiny('resnet38', vectors_from=value.replace('FOLDER', str(tmp_path))), tmp_path)

def test_a_run_can_be_evaluated_without_the_vectors_it_was_mined_from(manifest, tmp_path):
    np.save(tmp_path/'e.npy', np.random.default_rng(0).normal(size=(8, 5)))
    run = train_on(manifest, tiny('cnn14', seconds=1., vectors_from=str(tmp_path/'e.npy')), tmp_path/'run', '3cmlf')
    (tmp_path/'e.npy').unlink()
    assert evaluate_on(run, manifest)['coverage']['coverage'] == '2 of 2 clips'


# --- normalisation that does not depend on the batch

@pytest.fixture(params=['resnet38', 'cnn14'])
def grouped(request): return new(request.param, norm='group')

def test_clips_of_an_encoder_with_group_norm_do_not_depend_on_each_other(grouped):
    store = split(grouped).store
    with torch.no_grad(): grouped.train().audio(store)
    grouped.eval()
    assert torch.allclose(grouped.audio(store)[3:5], grouped.audio(store[3:5]), atol=1e-5)
    assert not [n for n, m in grouped.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]

def test_a_saved_model_keeps_its_norm_and_older_files_have_batch_norm(grouped, tmp_path):
    grouped.save(tmp_path/'m')
    found = DualEncoder.load(tmp_path/'m')
    assert found.audio.norm == 'group' and all(map(torch.equal, embed(found, split(found)), embed(grouped, split(grouped))))
    new('resnet38').save(tmp_path/'old')
    settings = read_json(tmp_path/'old'/'encoders.json')
    del settings['audio']['norm']
    write_json(tmp_path/'old'/'encoders.json', settings)
    assert DualEncoder.load(tmp_path/'old').audio.norm == 'batch'

def test_weights_of_panns_belong_to_batch_norm(tmp_path):
    torch.save(dict(model=cnn14_entries(2)), tmp_path/'cnn14.pth')
    with pytest.raises(CmlfError, match='set norm=batch'): Cnn14(2, norm='group').load_panns(tmp_path/'cnn14.pth')

@pytest.mark.parametrize('norm', ['eval', 'moving', 'renorm', 'train'])
def test_the_last_stage_normalises_as_its_setting_says(norm):
    profile = tiny('resnet38', last_norm=norm, keep_start=False)
    model, seen = new('resnet38'), []
    pairs = split(model, 8)
    bn = model.audio.conv_block1.bn1
    class Watched(Trainer):
        def loss_of(self, batch):
            before = bn.running_mean.clone()
            loss = super().loss_of(batch)
            seen.append((self.stage, type(bn).__name__, bn.training, torch.equal(before, bn.running_mean)))
            return loss
    stages = [Stage('random', 'both', 1), Stage('random', 'text', 1), Stage('random', 'both', 1, last=True)]
    Watched(model, pairs, pairs, profile, stages, log=lambda _: None).fit()
    last = dict(eval=('BatchNorm2d', False, True), moving=('MovingNorm', True, False), renorm=('BatchRenorm', True, False), train=('BatchNorm2d', True, False))[norm]
    assert {s[1:] for s in seen if s[0] == 0} == {('BatchNorm2d', True, False)} and {s[1:] for s in seen if s[0] == 2} == {last}
    assert type(bn) is torch.nn.BatchNorm2d # as it was


# --- the claim

def test_other_models_are_trained_on_request_only(tmp_path):
    from cmlf.appendix.choices import claims_needed
    from cmlf.appendix.comparisons import MODELS, test_comparisons as compare, COMPARISONS
    exp = Experiment(get_profile('smoke', dict(n_train=16, n_val=6, n_test=8, width=2, batch_size=4, seconds=1.)), tmp_path)
    assert not [s for s in claims_needed(exp, 1) if 'encoder=' in s.changes]
    only = Experiment(exp.profile, tmp_path, only='*encoder=cnn14*')
    needed = claims_needed(only, 1)
    assert [s.system for s in needed] == ['3cmlf', 'baseline'] and {s.changes for s in needed} == {'encoder=cnn14'}
    c8 = [c for c in COMPARISONS if c.claim == 'C8']
    assert len(c8) == 4 and not [c for c in compare(only, 0, c8).comparison if any(m in c for m in MODELS)]
    only.train_all(needed)
    nothing = Experiment(exp.profile, tmp_path, only='nothing')
    frame = compare(nothing, 1, c8)
    assert frame[frame.seeds > 0].comparison.tolist() == ['three stages over joint, CNN14 for ResNet38']
    assert 'three stages over joint, CLAP' not in frame.comparison.tolist()

def test_text_encoders_of_other_tokenizers_are_built_from_parts():
    tokenizer, bert = tiny_bert()
    text = TextEncoder.of(tokenizer, bert, 'mean', frozen=1, name='mine')
    assert text.n_out == 64 and text.frozen == 1
    with pytest.raises(CmlfError, match='^mine: its tokenizer has ids'):
        TextEncoder.of(tokenizer, transformers.BertModel(transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
                                                                                   num_attention_heads=1)), name='mine')

def test_a_spec_names_a_path_by_its_last_part():
    assert RunSpec('baseline', 'scratch', changes='encoder=clap:/a/b/clap lr=0.1').name == 'baseline-scratch-encoder=clap-lr=0.1-b32-s0'
    assert ClapFrontEnd(new_extractor(2)).frames() == 201
