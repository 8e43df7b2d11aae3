"""PANNs files at full size, files that must be refused, text models from folders, teachers that stay still."""
import os, subprocess, sys, zipfile

import librosa
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from scipy.signal import get_window

from cmlf.core import CmlfError, get_profile
from cmlf.encoders import (SAFE, DualEncoder, ResNet38, TextEncoder, dropout, load_bert, packaged_minilm, read_panns,
                           spec_augment)


# PANNs' 246 entries, written down without looking at our trunk

def _bn(name, n): return {f'{name}.{k}': (n,) for k in ('weight', 'bias', 'running_mean', 'running_var')} | {
    f'{name}.num_batches_tracked': ()}

def _conv(name, o, i, size=3): return {f'{name}.weight': (o, i, size, size)}

def _pair(name, i, o):
    return _conv(f'{name}.conv1', o, i) | _conv(f'{name}.conv2', o, o) | _bn(f'{name}.bn1', o) | _bn(f'{name}.bn2', o)

def panns_shapes(w):
    shapes = _bn('bn0', 64) | _pair('conv_block1', 1, w) | _pair('conv_block_after1', 8 * w, 32 * w)
    for layer, i, o, n in ((1, w, w, 3), (2, w, 2 * w, 4), (3, 2 * w, 4 * w, 6), (4, 4 * w, 8 * w, 3)):
        for b in range(n): shapes |= _pair(f'resnet.layer{layer}.{b}', o if b else i, o)
        if i != o:
            down = f'resnet.layer{layer}.0.downsample'
            shapes |= _conv(f'{down}.1', o, i, 1) | _bn(f'{down}.2', o)
    n = 32 * w
    return shapes | {'fc1.weight': (n, n), 'fc1.bias': (n,), 'fc_audioset.weight': (527, n), 'fc_audioset.bias': (527,)}

def panns_front():
    "The front end by scipy and librosa, the way PANNs' own library computes it."
    omega = np.exp(-2j * np.pi / 1024)
    W = np.power(omega, np.outer(np.arange(1024), np.arange(513))) * get_window('hann', 1024)[:, None]
    mel = librosa.filters.mel(sr=32000, n_fft=1024, n_mels=64, fmin=50, fmax=14000).T
    front = {'spectrogram_extractor.stft.conv_real.weight': W.real.T[:, None],
             'spectrogram_extractor.stft.conv_imag.weight': W.imag.T[:, None], 'logmel_extractor.melW': mel}
    return {k: torch.tensor(np.ascontiguousarray(v), dtype=torch.float32) for k, v in front.items()}

FRONT = panns_front()

def entries(w):
    torch.manual_seed(w)
    return {k: torch.rand(s) if s else torch.tensor(9) for k, s in panns_shapes(w).items()} | FRONT

def sampler(): return dict(indexes_per_class=[np.random.permutation(9), np.arange(3)], queue=[1, 0], pointers_of_classes=[0, 2])

def save(path, model, legacy=False):
    torch.save(dict(iteration=600000, model=model, sampler=sampler()), path, _use_new_zipfile_serialization=not legacy)
    return path


def test_full_size_file(tmp_path):
    "Width 64, the format of ResNet38_mAP=0.434.pth, in the old container that file was written in."
    model = entries(64)
    assert len(model) == 246
    trunk = ResNet38(64).load_panns(save(tmp_path/'full.pth', model, legacy=True))
    mine = trunk.state_dict()
    assert len(mine) == 239 and set(model) - set(mine) == set(FRONT) | {k for k in model if k.startswith('fc')}
    assert all(torch.equal(v, model[k]) for k, v in mine.items())
    assert sum(p.numel() for p in trunk.parameters()) == 68_507_072

@pytest.mark.parametrize('legacy', [False, True])
def test_small_twin_both_containers(tmp_path, legacy):
    model = entries(2)
    assert torch.equal(ResNet38(2).load_panns(save(tmp_path/'m.pth', model, legacy)).bn0.weight, model['bn0.weight'])

def test_arrays_pickled_by_numpy_1(tmp_path):
    "The real file names NumPy's functions as NumPy 1 did."
    path, old = save(tmp_path/'new.pth', entries(1)), tmp_path/'old.pth'
    with zipfile.ZipFile(path) as z, zipfile.ZipFile(old, 'w', zipfile.ZIP_STORED) as out:
        for info in z.infolist():
            data = z.read(info)
            if info.filename.endswith('data.pkl'):
                assert b'numpy._core.multiarray' in data or b'numpy.core.multiarray' in data
                data = data.replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
            out.writestr(info, data)
    assert len(read_panns(old)) == 246
    assert len(SAFE) == 5

def test_safetensors_twin(tmp_path):
    model = entries(2)
    save_file(model, tmp_path/'m.safetensors')
    assert torch.equal(ResNet38(2).load_panns(tmp_path/'m.safetensors').bn0.bias, model['bn0.bias'])

def test_loaded_weights_are_used(tmp_path):
    "A trunk with loaded weights computes what PyTorch computes from them, block by block."
    m = {k: v * 0.2 if v.is_floating_point() else v for k, v in entries(2).items()} | FRONT
    trunk = ResNet38(2).load_panns(save(tmp_path/'m.pth', m)).eval()
    F = torch.nn.functional
    bn = lambda x, n: F.batch_norm(x, m[f'{n}.running_mean'], m[f'{n}.running_var'], m[f'{n}.weight'], m[f'{n}.bias'])
    conv = lambda x, n: F.conv2d(x, m[f'{n}.weight'], padding=m[f'{n}.weight'].shape[-1] // 2)
    def pair(x, n): return bn(conv(F.relu(bn(conv(x, f'{n}.conv1'), f'{n}.bn1')), f'{n}.conv2'), f'{n}.bn2')
    image = torch.randn(2, 101, 64) * 10 - 40
    with torch.no_grad():
        x = bn(image[:, None].transpose(1, 3), 'bn0').transpose(1, 3)
        x = F.avg_pool2d(F.relu(pair(x, 'conv_block1')), 2)
        for layer, n in enumerate((3, 4, 6, 3), 1):
            for b in range(n):
                name, skip = f'resnet.layer{layer}.{b}', x
                if layer > 1 and b == 0:
                    x = F.avg_pool2d(x, 2)
                    skip = bn(conv(x, f'{name}.downsample.1'), f'{name}.downsample.2')
                x = F.relu(pair(x, name) + skip)
        x = F.relu(pair(F.avg_pool2d(x, 2), 'conv_block_after1')).mean(3)
        assert torch.allclose(trunk(image), x.max(2)[0] + x.mean(2), rtol=1e-4, atol=1e-4)


# refused

@pytest.mark.parametrize('legacy', [False, True])
def test_pickle_with_code_is_not_run(tmp_path, legacy):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)
    torch.save(dict(model=entries(1), sampler=Evil()), tmp_path/'evil.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CmlfError, match='evil.pth: not loaded, it wants to run posix.system'):
        ResNet38(1).load_panns(tmp_path/'evil.pth')
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04 half a zip', bytes(range(256)) * 9])
@pytest.mark.parametrize('name', ['x.pth', 'x.safetensors'])
def test_garbage_is_one_line(tmp_path, content, name):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(CmlfError, match='not loaded') as e: read_panns(tmp_path/name)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('thing', [[1, 2], {'model': {}}, {'model': {'a': 1}}, {'iteration': 3}])
def test_no_weights_inside(tmp_path, thing):
    torch.save(thing, tmp_path/'x.pth')
    with pytest.raises(CmlfError, match="holds no weights under 'model'"): read_panns(tmp_path/'x.pth')

def test_no_such_file(tmp_path):
    with pytest.raises(CmlfError, match='no such file; download'): read_panns(tmp_path/'x.pth')

NAME = 'resnet.layer3.5.conv2.weight'

@pytest.mark.parametrize('change, said', [
    (lambda m: m.pop(NAME), rf'missing: 1 \({NAME}\)'),
    (lambda m: m.update(extra=torch.zeros(2)), r'unexpected: 1 \(extra\)'),
    (lambda m: m.update({NAME: torch.zeros(4, 4, 1, 1)}), rf'another shape: 1 \({NAME} \(4, 4, 1, 1\) for \(4, 4, 3, 3\)\)'),
    (lambda m: m.update({NAME: torch.full((4, 4, 3, 3), torch.inf)}), rf'not finite: 1 \({NAME}\)'),
    (lambda m: m.pop('logmel_extractor.melW'), r'missing: 1 \(logmel_extractor.melW\)'),
    (lambda m: [m.pop(k) for k in list(m) if k.startswith('resnet')], r'missing: 210 \('),
])
def test_what_does_not_fit_is_named(tmp_path, change, said):
    model = entries(1)
    change(model)
    trunk = ResNet38(1)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    with pytest.raises(CmlfError, match=said) as e: trunk.load_panns(save(tmp_path/'m.pth', model))
    assert '\n' not in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())

def test_other_width_says_which(tmp_path):
    with pytest.raises(CmlfError, match='set width=2'): ResNet38(4).load_panns(save(tmp_path/'m.pth', entries(2)))

@pytest.mark.parametrize('mel', [dict(fmax=16000), dict(fmin=0), dict(htk=True), dict(norm=None), dict(sr=44100)])
def test_other_mel_filters_are_named(tmp_path, mel):
    args = dict(sr=32000, n_fft=1024, n_mels=64, fmin=50, fmax=14000) | mel
    model = entries(1) | {'logmel_extractor.melW': torch.tensor(librosa.filters.mel(**args).T.copy())}
    with pytest.raises(CmlfError, match=r'Differs: 1 \(logmel_extractor.melW\)'):
        ResNet38(1).load_panns(save(tmp_path/'m.pth', model))

def test_other_window_is_named(tmp_path):
    ratio = torch.tensor(get_window('hann', 1024, fftbins=False) / np.maximum(get_window('hann', 1024), 1e-12)).float()
    model = entries(1)
    for k in FRONT:
        if 'stft' in k: model[k] = model[k] * ratio
    with pytest.raises(CmlfError, match=r'Differs: 2 \(spectrogram_extractor.stft.conv_real'):
        ResNet38(1).load_panns(save(tmp_path/'m.pth', model))


# the trunk

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_dropout_drops_and_scales(dtype):
    torch.manual_seed(0)
    x = torch.ones(101, 203, dtype=dtype)[:, ::2].requires_grad_()  # neither contiguous nor of even size
    y = dropout(x, 0.3)
    y.sum().backward()
    assert torch.equal(y, x.grad) and abs((y == 0).double().mean() - 0.3) < 0.015
    assert torch.allclose(y[y > 0].double(), torch.tensor(1 / 0.7).double(), rtol=5e-3)
    assert not torch.equal(y, dropout(x, 0.3))
    assert (dropout(x, 0.999999) == 0).double().mean() > 0.99  # next to 1, beyond the last threshold of 16 bits

def test_dropout_backward_takes_any_layout():
    x = torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = dropout(x, 0.5)
    g = torch.randn(4, 6, 5, 3)
    y.backward(g)
    assert torch.allclose(x.grad, torch.where(y == 0, 0, 2 * g))

def test_spec_augment_keeps_the_rest():
    torch.manual_seed(0)
    x = torch.rand(50, 40, 64) + 1
    y = spec_augment(x)
    blank = y == 0
    assert torch.equal(y[~blank], x[~blank])
    assert torch.equal(blank, blank.all(2, keepdim=True) | blank.all(1, keepdim=True))
    assert spec_augment(x, time_stripe=1, freq_stripe=1).equal(x)

def test_trunk_repeats_itself_from_a_seed():
    x = torch.randn(2, 64, 64)
    def once():
        torch.manual_seed(4)
        return ResNet38(2, spec_augment=True).train()(x)
    assert torch.equal(once(), once())

def test_narrow_trunk_trains_in_bf16():
    model, x = ResNet38(2), torch.randn(4, 40, 64)
    with torch.autocast('cpu', torch.bfloat16): y = model(x)
    y.square().sum().backward()
    assert y.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# text models

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A small random BERT with its tokenizer, saved as anybody would."
    path = tmp_path_factory.mktemp('bert')
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_minilm())
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=40)
    transformers.BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

def test_text_model_from_folder(folder):
    text = TextEncoder(str(folder), dropout=0.3).eval()
    reference = transformers.BertModel.from_pretrained(folder).eval()
    tokens = text.tokenize(['a dog barks', 'rain'])
    with torch.no_grad(): want = reference(**tokens).last_hidden_state
    assert text.n_out == 16 and torch.allclose(text(tokens), want[:, 0], atol=1e-6)
    mean = TextEncoder(str(folder), pool='mean').eval()
    assert torch.allclose(mean(tokens)[1], want[1, :3].mean(0), atol=1e-6)  # [CLS] rain [SEP]
    assert text.model.config.hidden_dropout_prob == text.model.config.attention_probs_dropout_prob == 0.3
    assert text.model.pooler is None
    with pytest.raises(CmlfError, match='40 fit'): text.tokenize(['rain ' * 60])

def test_folder_without_some_weights_is_refused(folder, tmp_path):
    for f in folder.iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    weights = transformers.BertModel.from_pretrained(folder).state_dict()
    weights.pop('encoder.layer.0.output.dense.weight')
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(CmlfError, match=r'weights missing: 1 \(encoder.layer.0.output.dense.weight\)'): load_bert(str(tmp_path))

def test_folder_of_another_kind_is_refused(tmp_path):
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(CmlfError, match="'gpt2' Known: bert"): load_bert(str(tmp_path))

def test_roberta_is_bert_enough(folder, tmp_path):
    config = transformers.RobertaConfig(vocab_size=30600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        intermediate_size=32, pad_token_id=0)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    text = TextEncoder(str(tmp_path))
    assert text(text.tokenize(['rain'])).shape == (1, 16)

def test_offline_hub_name_is_one_line():
    "With the hub switched off by its own variable, in a fresh process: one line, at once, exit by CmlfError."
    code = "from cmlf.encoders import TextEncoder\ntry: TextEncoder('no-such/bert')\nexcept ValueError as e: print(type(e).__name__, e)"
    env = os.environ | dict(HF_HUB_OFFLINE='1')
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    line, = found.stdout.splitlines()
    assert line.startswith('CmlfError') and 'hf download no-such/bert' in line and not found.stderr


# teachers

@pytest.mark.parametrize('which, teacher', [('audio', 'text'), ('text', 'audio')])
@pytest.mark.parametrize('freeze_head', [False, True])
def test_teacher_is_unchanged_by_a_step(which, teacher, freeze_head):
    torch.manual_seed(0)
    model = DualEncoder.from_profile(get_profile('smoke', dict(width=2)))
    model.train_only(which, freeze_head).train()
    x, tokens = torch.randn(4, 40, 64), model.text.tokenize(['a dog', 'rain on a roof', 'a bell', 'birds'])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for _ in range(2):
        (model.embed_audio(x) * model.embed_text(tokens)).sum().backward()
        optimiser.step(); optimiser.zero_grad()
    changed = {k.split('.')[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'audio', 'text', 'audio_head', 'text_head'} - {teacher} - ({f'{teacher}_head'} if freeze_head else set())

def test_everybody_learns_again_after_the_stages():
    model = DualEncoder.from_profile(get_profile('smoke', dict(width=2, train_word_table=True)))
    model.train_only('audio').train_only('text', True).train_only('both')
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
