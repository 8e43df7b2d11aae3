"""PANNs files at full size, files that must be refused, text models from folders, frozen encoders that do not change."""
import json, os, shutil, subprocess, sys, zipfile

import librosa
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import save_file
from scipy.signal import get_window
from tokenizers import ByteLevelBPETokenizer, SentencePieceUnigramTokenizer, Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing

from cmlf.appendix.bert import load_bert, packaged_minilm
from cmlf.appendix.checkpoints import SAFE, read_panns
from cmlf.appendix.dropout import dropout
from cmlf.config import get_profile
from cmlf.core import CmlfError
from cmlf.encoders import DualEncoder, ResNet38, TextEncoder, spec_augment


# PANNs' 246 arrays, written down independently of our encoder

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
    encoder = ResNet38(64).load_panns(save(tmp_path/'full.pth', model, legacy=True))
    mine = encoder.state_dict()
    assert len(mine) == 239 and set(model) - set(mine) == set(FRONT) | {k for k in model if k.startswith('fc')}
    assert all(torch.equal(v, model[k]) for k, v in mine.items())
    assert sum(p.numel() for p in encoder.parameters()) == 68_507_072

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
    "An encoder with loaded weights computes what PyTorch computes from them, block by block."
    m = {k: v * 0.2 if v.is_floating_point() else v for k, v in entries(2).items()} | FRONT
    encoder = ResNet38(2).load_panns(save(tmp_path/'m.pth', m)).eval()
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
        assert torch.allclose(encoder(image), x.max(2)[0] + x.mean(2), rtol=1e-4, atol=1e-4)


# refused

@pytest.mark.parametrize('legacy', [False, True])
def test_pickle_with_code_is_not_run(tmp_path, legacy):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)
    torch.save(dict(model=entries(1), sampler=Evil()), tmp_path/'evil.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CmlfError, match='evil.pth: not loaded, it would run posix.system'):
        ResNet38(1).load_panns(tmp_path/'evil.pth')
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04 half a zip', bytes(range(256)) * 9])
@pytest.mark.parametrize('name', ['x.pth', 'x.safetensors'])
def test_damaged_files_give_one_line(tmp_path, content, name):
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

@pytest.mark.parametrize('change, message', [
    (lambda m: m.pop(NAME), rf'missing: 1 \({NAME}\)'),
    (lambda m: m.update(extra=torch.zeros(2)), r'unexpected: 1 \(extra\)'),
    (lambda m: m.update({NAME: torch.zeros(4, 4, 1, 1)}), rf'another shape: 1 \({NAME} \(4, 4, 1, 1\) for \(4, 4, 3, 3\)\)'),
    (lambda m: m.update({NAME: torch.full((4, 4, 3, 3), torch.inf)}), rf'not finite: 1 \({NAME}\)'),
    (lambda m: m.pop('logmel_extractor.melW'), r'missing: 1 \(logmel_extractor.melW\)'),
    (lambda m: [m.pop(k) for k in list(m) if k.startswith('resnet')], r'missing: 210 \('),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    model = entries(1)
    change(model)
    encoder = ResNet38(1)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(CmlfError, match=message) as e: encoder.load_panns(save(tmp_path/'m.pth', model))
    assert '\n' not in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())

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


# the audio encoder

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

def test_audio_encoder_repeats_itself_from_a_seed():
    x = torch.randn(2, 64, 64)
    def once():
        torch.manual_seed(4)
        return ResNet38(2, spec_augment=True).train()(x)
    assert torch.equal(once(), once())

def test_narrow_audio_encoder_trains_in_bf16():
    model, x = ResNet38(2), torch.randn(4, 40, 64)
    with torch.autocast('cpu', torch.bfloat16): y = model(x)
    y.square().sum().backward()
    assert y.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# text models

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A small random BERT with its tokenizer, saved by save_pretrained."
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
    with pytest.raises(CmlfError, match=r"'gpt2'\. Known: bert"): load_bert(str(tmp_path))

def test_roberta_is_accepted(folder, tmp_path):
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


# text models of every type, small and random, in the files that save_pretrained and the tokenizers library write

OFFSET = 'roberta', 'xlm-roberta', 'camembert'
TYPES = 'bert', *OFFSET
CAPTIONS = ['a dog barks in the rain', 'a Loud bell rings; far away', 'café water splashes', 'birds sing 123'] * 20

def pieces(type):
    "A tokenizer of the type's kind, trained on `CAPTIONS`."
    special = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
    if type == 'roberta': tokenizer = ByteLevelBPETokenizer(add_prefix_space=True)
    else: tokenizer = SentencePieceUnigramTokenizer()
    unknown = {} if type == 'roberta' else dict(unk_token='<unk>')
    tokenizer.train_from_iterator(CAPTIONS, vocab_size=400, special_tokens=special, show_progress=False, **unknown)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    return tokenizer

def text_folder(path, type, settings=(), max_positions=40, **config):
    "A folder as on the hub; `settings` is added to tokenizer_config.json."
    path.mkdir(parents=True, exist_ok=True)
    if type == 'bert':
        transformers.AutoTokenizer.from_pretrained(packaged_minilm()).save_pretrained(path)
        settings_file = json.loads((path/'tokenizer_config.json').read_text())
    else:
        pieces(type).save(str(path/'tokenizer.json'))
        names = dict(bos_token='<s>', eos_token='</s>', cls_token='<s>', sep_token='</s>', unk_token='<unk>', pad_token='<pad>',
                     mask_token='<mask>')
        settings_file = names | dict(tokenizer_class=dict(zip(OFFSET, ('RobertaTokenizer', 'XLMRobertaTokenizer', 'CamembertTokenizer')))[type])
    (path/'tokenizer_config.json').write_text(json.dumps(settings_file | dict(settings)))
    sizes = dict(vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.AutoConfig.for_model(type, **sizes | dict(max_position_embeddings=max_positions) | config)
    torch.manual_seed(1)
    transformers.AutoModel.from_config(config).save_pretrained(path)
    return path

def edit_json(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def caption_of(encoder, n):
    "A caption of exactly n tokens."
    captions = (' '.join(['a'] * words) + tail for words in range(1, n) for tail in ('', 'a'))
    return next(c for c in captions if len(encoder.tokenizer(c, verbose=False)['input_ids']) == n)

def reference(folder, rows):
    "Outputs of transformers for each caption separately."
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad(): return [model(torch.tensor([r])).last_hidden_state[0] for r in rows]

@pytest.mark.parametrize('type', TYPES)
@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_padding_side_changes_nothing(tmp_path, type, side, pool):
    text = TextEncoder(str(text_folder(tmp_path/'m', type, dict(padding_side=side))), pool).eval()
    assert text.tokenizer.padding_side == side
    captions = CAPTIONS[:4]
    tokens = text.tokenize(captions)
    rows = [text.tokenizer(c)['input_ids'] for c in captions]
    assert [ids[m.bool()].tolist() for ids, m in zip(*tokens.values())] == rows
    assert tokens['attention_mask'].diff(dim=1).le(0).all() and len({len(r) for r in rows}) > 1  # ones, then zeros
    want = [h[0] if pool == 'cls' else h.mean(0) for h in reference(tmp_path/'m', rows)]
    with torch.no_grad(): assert torch.allclose(text(tokens), torch.stack(want), atol=1e-6)

@pytest.mark.parametrize('type', TYPES)
def test_longest_caption_of_a_type(tmp_path, type):
    "RoBERTa's positions begin after the padding's: 40 of them hold 38 tokens."
    text = TextEncoder(str(text_folder(tmp_path/'m', type))).eval()
    assert text.longest == (40 if type == 'bert' else 38)
    captions = [caption_of(text, text.longest), 'a']
    tokens = text.tokenize(captions)
    want = reference(tmp_path/'m', [text.tokenizer(c)['input_ids'] for c in captions])
    with torch.no_grad(): assert torch.allclose(text(tokens), torch.stack([h[0] for h in want]), atol=1e-6)
    with pytest.raises(CmlfError, match=f'has {text.longest + 1} tokens, {text.longest} fit'):
        text.tokenize([caption_of(text, text.longest + 1)])

def test_514_positions_hold_512_tokens(tmp_path):
    text = TextEncoder(str(text_folder(tmp_path/'m', 'roberta', max_positions=514))).eval()
    with torch.no_grad(): assert text(text.tokenize([caption_of(text, 512)])).isfinite().all()
    with pytest.raises(CmlfError, match='has 513 tokens, 512 fit'): text.tokenize([caption_of(text, 513)])

@pytest.mark.parametrize('type', TYPES)
def test_tokenizer_may_allow_less(tmp_path, type):
    text = TextEncoder(str(text_folder(tmp_path/'m', type, dict(model_max_length=9))))
    assert text.longest == 9 and text.tokenize([caption_of(text, 9)])['input_ids'].shape == (1, 9)
    with pytest.raises(CmlfError, match='has 10 tokens, 9 fit'): text.tokenize([caption_of(text, 10)])

def test_padding_id_moves_the_positions(tmp_path):
    "The offset is the config's padding id, whatever it is."
    folder = text_folder(tmp_path/'m', 'roberta', dict(pad_token='<mask>'), pad_token_id=4)
    text = TextEncoder(str(folder)).eval()
    assert text.longest == 35 and text.pad_id == 4
    with torch.no_grad(): assert text(text.tokenize([caption_of(text, 35)])).isfinite().all()

@pytest.mark.parametrize('type', TYPES)
def test_without_pad_token(tmp_path, type):
    "Padding comes from the model."
    a = text_folder(tmp_path/'a', type, dict(tokenizer_class='PreTrainedTokenizerFast'))
    b = shutil.copytree(a, tmp_path/'b')
    edit_json(b/'tokenizer_config.json', pad_token=None)
    plain, text = (TextEncoder(str(f)).eval() for f in (a, b))
    assert text.tokenizer.pad_token_id is None
    one, two = plain.tokenize(CAPTIONS[:4]), text.tokenize(CAPTIONS[:4])
    assert all(torch.equal(one[k], two[k]) for k in one) and torch.equal(plain(one), text(two))

def test_no_attention_mask_from_the_tokenizer(tmp_path):
    settings = dict(model_input_names=['input_ids'])
    text = TextEncoder(str(text_folder(tmp_path/'m', 'bert', settings)))
    assert set(text.tokenizer(['a'])) == {'input_ids'}
    assert text.tokenize(['a dog', 'a'])['attention_mask'].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]

@pytest.mark.parametrize('name', ['minilm', 'tiny', 'folder'])
@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_ordinary_captions_are_padded_as_by_the_library(tmp_path, name, pool):
    "The tokens bit for bit as the tokenizer's own padding; the vectors as the library's padded forward pass, up to rounding."
    text = TextEncoder(str(text_folder(tmp_path/'m', 'bert', max_positions=64)) if name == 'folder' else name, pool).eval()
    captions = ['a dog barks', 'Rain falls on a roof; the wind, too!', 'birds ' * 40, '', 'café 雨']
    found = text.tokenizer(captions, padding='longest', truncation=False, return_tensors='pt')
    want = dict(input_ids=found['input_ids'], attention_mask=found['attention_mask'])
    tokens = text.tokenize(captions)
    assert tokens.keys() == want.keys() and all(torch.equal(tokens[k], want[k]) and tokens[k].dtype == torch.int64 for k in want)
    with torch.no_grad():
        h = text.model(**want).last_hidden_state
        m = want['attention_mask'][:, :, None].float()
        torch.testing.assert_close(text(tokens), h[:, 0] if pool == 'cls' else (h * m).sum(1) / m.sum(1), rtol=1e-5, atol=2e-5)


# captions that are refused

def test_long_captions_are_named_and_counted():
    text = TextEncoder('tiny')
    captions = ['a dog'] + ['A long ' + 'rain ' * 700] * 4
    names = [f'my.csv row {i}' for i in range(11, 16)]
    with pytest.raises(CmlfError) as e: text.tokenize(captions, names=names)
    assert str(e.value) == ("my.csv row 12: caption 'A long rain rain rain rain rain rain rai ...' has 704 tokens, "
                            "512 fit: shorten it and 3 more")
    with pytest.raises(CmlfError, match=r"^my.csv row 12: .* shorten it$"): text.tokenize(captions[:2], names[:2])
    with pytest.raises(CmlfError, match=r"^caption 1 'A long .* has 704 tokens"): text.tokenize(captions[:2])
    with pytest.raises(CmlfError, match='1 names for 5 captions'): text.tokenize(captions, names[:1])

@pytest.mark.parametrize('thing', [None, float('nan'), 3, b'rain', ['a', 'dog']])
def test_captions_that_are_not_text_are_named(thing):
    text = TextEncoder('tiny')
    with pytest.raises(CmlfError, match='my.csv row 3: caption .* is not text'):
        text.tokenize(['rain', thing], ['my.csv row 2', 'my.csv row 3'])

def test_captions_of_any_sequence():
    text, plain = TextEncoder('tiny'), ['a dog', 'rain']
    for captions in (tuple(plain), np.array(plain), pd.Series(plain, index=[7, 9])):
        assert torch.equal(text.tokenize(captions)['input_ids'], text.tokenize(plain)['input_ids'])
    with pytest.raises(CmlfError, match='caption 0 .* 902 tokens'): text.tokenize(pd.Series(['rain ' * 900], index=[7]))

def test_caption_without_tokens(tmp_path):
    "Where a tokenizer adds none of its own, an empty caption has nothing to take the mean of."
    settings = dict(tokenizer_class='PreTrainedTokenizerFast')
    folder = text_folder(tmp_path/'m', 'bert', settings)
    edit_json(folder/'tokenizer.json', post_processor=None)
    with pytest.raises(CmlfError, match=r"puts no \[CLS\] before a caption; set text_pool='mean'"): TextEncoder(str(folder))
    text = TextEncoder(str(folder), 'mean')
    with pytest.raises(CmlfError, match="caption 1 '' has no tokens"): text.tokenize(['rain', ''])


# tokenizers and models that do not belong together

def refused(folder, match):
    with pytest.raises(CmlfError, match=match) as e: TextEncoder(str(folder))
    assert str(folder) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('type', TYPES)
def test_vocabulary_beyond_the_word_table(tmp_path, type):
    refused(text_folder(tmp_path/'m', type, vocab_size=30), r'its tokenizer has ids up to \d+, but its word table has 30 rows')

def test_special_tokens_beyond_the_word_table(tmp_path):
    "They cause no error until a caption contains one."
    n = len(pieces('camembert').get_vocab())
    text = TextEncoder(str(text_folder(tmp_path/'m', 'camembert', vocab_size=n)))
    assert len(text.tokenizer) > n
    text.tokenize(['a dog'])
    with pytest.raises(CmlfError, match='caption 1 .* a token that is not in the word table'):
        text.tokenize(['a dog', 'a dog <unk>NOTUSED'])

@pytest.mark.parametrize('type', TYPES)
def test_folder_without_tokenizer_files(tmp_path, type):
    "transformers makes a tokenizer of special tokens, to which every word is unknown."
    folder = text_folder(tmp_path/'m', type)
    (folder/'tokenizer.json').unlink()
    refused(folder, 'its tokenizer has no words; add its files')

@pytest.mark.parametrize('type', TYPES)
@pytest.mark.parametrize('content', ['', '{"x"', '{}', '[]'])
def test_broken_tokenizer_file_is_one_line(tmp_path, type, content):
    folder = text_folder(tmp_path/'m', type)
    (folder/'tokenizer.json').write_text(content)
    refused(folder, 'cannot be loaded')

@pytest.mark.parametrize('type', OFFSET)
def test_other_padding_than_the_positions_expect(tmp_path, type):
    refused(text_folder(tmp_path/'m', type, pad_token_id=3), 'its tokenizer pads with id 1, the model with 3')

def test_roberta_without_padding_id(tmp_path):
    folder = text_folder(tmp_path/'m', 'roberta')
    edit_json(folder/'config.json', pad_token_id=None)
    refused(folder, 'config.json has no pad_token_id')

@pytest.mark.parametrize('type', TYPES)
@pytest.mark.parametrize('changes, match', [(dict(is_decoder=True), 'it is a decoder'),
                                            (dict(position_embedding_type='relative_key'), "positions are 'relative_key'")])
def test_models_of_unsuited_kinds(tmp_path, type, changes, match):
    folder = text_folder(tmp_path/'m', type)
    edit_json(folder/'config.json', **changes)
    refused(folder, match)

def test_captions_of_another_segment_type(tmp_path):
    folder = text_folder(tmp_path/'m', 'bert', dict(tokenizer_class='PreTrainedTokenizerFast',
                                                    model_input_names=['input_ids', 'token_type_ids']))
    tokenizer = Tokenizer.from_file(str(folder/'tokenizer.json'))
    tokenizer.post_processor = TemplateProcessing(single='[CLS]:0 $A:1 [SEP]:1', special_tokens=[('[CLS]', 101), ('[SEP]', 102)])
    tokenizer.save(str(folder/'tokenizer.json'))
    refused(folder, 'a type other than 0')


# models that need nothing but their folder

class NoNetwork:
    def __init__(self, *a, **k): raise AssertionError('a socket was opened')

def dual(name, pool='cls', train_word_table=True):
    "A small dual encoder with random weights and random running statistics."
    torch.manual_seed(2)
    model = DualEncoder(ResNet38(2, 0.3, 0.1, True, 7), TextEncoder(str(name), pool, 0.3, train_word_table), 8, 12)
    for v in model.state_dict().values():
        if v.is_floating_point(): v.add_(torch.rand_like(v) * 0.1)
    return model

def outputs(model):
    x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(): return model.embed_audio(x), model.embed_text(model.text.tokenize(CAPTIONS[:4]))

@pytest.mark.parametrize('name', ['minilm', 'tiny', *TYPES])
def test_saved_model_needs_its_folder_only(tmp_path, name, monkeypatch):
    model = dual(text_folder(tmp_path/'m', name, dict(padding_side='left')) if name in TYPES else name, 'mean', False)
    want = outputs(model.eval())
    model.train_only('audio').save(tmp_path/'saved')
    os.rename(tmp_path/'saved', tmp_path/'moved')
    shutil.rmtree(tmp_path/'m', ignore_errors=True)
    monkeypatch.setattr('socket.socket', NoNetwork)
    for module in ('encoders', 'appendix.bert'): monkeypatch.setattr(f'cmlf.{module}.packaged_minilm', lambda: tmp_path/'gone')
    state = torch.get_rng_state()
    found = DualEncoder.load(tmp_path/'moved')
    assert torch.equal(torch.get_rng_state(), state)  # draws nothing from the caller's stream
    assert all(map(torch.equal, outputs(found), want))
    assert not any(m.training for m in found.modules()) and found.frozen == ()
    assert found.state_dict().keys() == model.state_dict().keys()
    a, b = found.audio, found.text
    assert (a.width, a.dropout, a.block_dropout, a.spec_augment, a.time_stripe) == (2, 0.3, 0.1, True, 7)
    assert (b.pool, b.dropout, b.train_word_table, b.longest) == ('mean', 0.3, False, model.text.longest)
    assert b.model.config.hidden_dropout_prob == b.model.config.attention_probs_dropout_prob == 0.3
    trainable = lambda m: [n for n, p in m.train_only('both').named_parameters() if p.requires_grad]
    assert trainable(found) == trainable(model) and not any('word_embeddings' in n for n in trainable(found))
    assert str(tmp_path) not in ''.join(f.read_text() for f in (tmp_path/'moved').rglob('*.json'))

def test_saved_again_over_another_model(tmp_path):
    dual('tiny').save(tmp_path/'saved')
    model = dual(text_folder(tmp_path/'m', 'xlm-roberta')).eval()
    model.save(tmp_path/'saved')
    assert all(map(torch.equal, outputs(DualEncoder.load(tmp_path/'saved')), outputs(model)))

def test_training_continues_after_loading(tmp_path):
    "One seed, one step: dropout and SpecAugment are the same in the loaded model."
    def step(model):
        torch.manual_seed(5)
        model.train_only('both')
        return model.embed_audio(torch.randn(4, 40, 64)), model.embed_text(model.text.tokenize(CAPTIONS[:4]))
    model = dual('tiny')
    model.save(tmp_path)
    assert all(map(torch.equal, step(DualEncoder.load(tmp_path)), step(model)))

def test_half_precision_files_become_float32(tmp_path):
    folder = text_folder(tmp_path/'m', 'bert')
    transformers.BertModel.from_pretrained(folder).half().save_pretrained(folder)
    model = dual(folder).eval()
    model.save(tmp_path/'saved')
    found = DualEncoder.load(tmp_path/'saved')
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert all(map(torch.equal, outputs(found), outputs(model)))

def test_tokenizer_whose_class_would_be_rebuilt_differently(tmp_path):
    "BertTokenizer takes its normaliser from settings, not from tokenizer.json."
    text = TextEncoder('tiny')
    text.tokenizer.backend_tokenizer.normalizer = Lowercase()
    want = text.tokenize(['Ｗｉｄｅ CAFÉ'])['input_ids']
    text.save(tmp_path)
    assert not torch.equal(want, TextEncoder('tiny').tokenize(['Ｗｉｄｅ CAFÉ'])['input_ids'])
    assert torch.equal(want, TextEncoder.load(tmp_path).tokenize(['Ｗｉｄｅ CAFÉ'])['input_ids'])

def test_text_encoder_alone(tmp_path):
    text = TextEncoder('minilm', 'mean', 0.2, False).eval()
    text.save(tmp_path/'t')
    assert not list((tmp_path/'t').glob('*.safetensors')) and sum(f.stat().st_size for f in (tmp_path/'t').iterdir()) < 1e6
    found = TextEncoder.load(tmp_path/'t')
    assert found.training and not torch.equal(found.model.embeddings.word_embeddings.weight, text.model.embeddings.word_embeddings.weight)
    found.load_state_dict(text.state_dict())
    tokens = found.eval().tokenize(CAPTIONS[:4])
    assert torch.equal(found(tokens), text(text.tokenize(CAPTIONS[:4])))

def test_quiet_and_offline_in_a_fresh_process(tmp_path):
    "No warning, no bar, no hub, even where the hub may be asked."
    dual('minilm').save(tmp_path/'saved')
    code = '''
import socket
class No:
    def __init__(self, *a, **k): raise AssertionError('a socket was opened')
from cmlf.encoders import DualEncoder
socket.socket = No
model = DualEncoder.load('saved')
model.save('again')
print(model.embed_text(model.text.tokenize(['a dog barks'])).shape)'''
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert (found.stdout, found.stderr) == ('torch.Size([1, 8])\n', '')

def test_code_in_the_folder_is_not_run(tmp_path):
    folder = text_folder(tmp_path/'m', 'bert')
    (folder/'evil.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")\nclass Evil: pass\n')
    edit_json(folder/'config.json', auto_map=dict(AutoConfig='evil.Evil', AutoModel='evil.Evil'))
    edit_json(folder/'tokenizer_config.json', auto_map=dict(AutoTokenizer=['evil.Evil', 'evil.Evil']))
    text = TextEncoder(str(folder))
    text.save(tmp_path/'t')
    shutil.copy(folder/'evil.py', tmp_path/'t')
    TextEncoder.load(tmp_path/'t')
    assert not (tmp_path/'ran').exists()

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp('saved')
    dual('tiny').save(path)
    return path

FILES = ['encoders.json', 'model.safetensors', 'text/text.json', 'text/config.json', 'text/tokenizer.json', 'text/tokenizer_config.json']

def test_these_are_the_files(saved):
    assert sorted(f.relative_to(saved).as_posix() for f in saved.rglob('*') if f.is_file()) == sorted(FILES)

@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('harm', ['missing', 'empty', 'cut', 'flipped'])
def test_damaged_folder_names_the_file(saved, tmp_path, name, harm):
    path = shutil.copytree(saved, tmp_path/'copy')/name
    data = path.read_bytes()
    if harm == 'missing': path.unlink()
    elif harm == 'flipped': path.write_bytes(data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 0x80]) + data[len(data) // 2 + 1:])
    else: path.write_bytes(data[:0 if harm == 'empty' else len(data) // 2])
    with pytest.raises(CmlfError, match='copy the whole folder again, or save the model again') as e: DualEncoder.load(tmp_path/'copy')
    assert str(e.value).startswith(f'{path}: ') and '\n' not in str(e.value)

AUDIO = dict(width=2, dropout=0.3, block_dropout=0.1, spec_augment=True, time_stripe=7)

@pytest.mark.parametrize('changes, match', [
    (dict(audio=dict(width=2)), 'should hold width, dropout, block_dropout'), (dict(audio=AUDIO | dict(depth=3)), 'should hold width'),
    (dict(audio=AUDIO | dict(width='wide')), "width='wide' is not usable"), (dict(audio=3), 'audio=3 is not usable'),
    (dict(audio=AUDIO | dict(width=4)), 'does not fit the model in encoders.json'),
    (dict(joint_dim=9), 'does not fit the model in encoders.json.*of another shape'), (dict(joint_dim='9'), "joint_dim='9' is not usable"),
    (dict(more=1), 'should hold audio, joint_dim, head_hidden, files')])
def test_description_of_another_model(saved, tmp_path, changes, match):
    shutil.copytree(saved, tmp_path/'copy')
    edit_json(tmp_path/'copy'/'encoders.json', **changes)
    with pytest.raises(CmlfError, match=match): DualEncoder.load(tmp_path/'copy')

def test_interrupted_save_is_not_taken_for_whole(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path/'copy')
    def full(*a, **k): raise OSError('no space left')
    monkeypatch.setattr('cmlf.encoders.save_file', full)
    with pytest.raises(OSError): dual('tiny').save(tmp_path/'copy')
    with pytest.raises(CmlfError, match='encoders.json: no such file'): DualEncoder.load(tmp_path/'copy')

def test_no_folder(tmp_path):
    with pytest.raises(CmlfError, match='encoders.json: no such file'): DualEncoder.load(tmp_path/'none')
    with pytest.raises(CmlfError, match='text.json: no such file'): TextEncoder.load(tmp_path/'none')

def test_text_settings_of_another_kind(saved, tmp_path):
    for changes, match in ((dict(pool=3), 'pool=3 is not usable'), (dict(pool='max'), "unknown text_pool in .*text.json: 'max'"),
                           (dict(probe=[1, 2]), 'cannot read this tokenizer .*install transformers')):
        shutil.copytree(saved/'text', tmp_path/'t', dirs_exist_ok=True)
        edit_json(tmp_path/'t'/'text.json', **changes)
        with pytest.raises(CmlfError, match=match): TextEncoder.load(tmp_path/'t')

def test_other_encoders_are_not_saved(tmp_path):
    class Other(ResNet38): pass
    with pytest.raises(CmlfError, match='the audio encoder is a Other; only these can be saved: ResNet38, Cnn14, ClapAudio'):
        DualEncoder(Other(2), TextEncoder('tiny'), 8, 8).save(tmp_path/'x')
    assert not (tmp_path/'x').exists()


# frozen encoders

@pytest.mark.parametrize('which, frozen', [('audio', 'text'), ('text', 'audio')])
@pytest.mark.parametrize('freeze_head', [False, True])
def test_frozen_encoder_is_unchanged_by_a_step(which, frozen, freeze_head):
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
    assert changed == {'audio', 'text', 'audio_head', 'text_head'} - {frozen} - ({f'{frozen}_head'} if freeze_head else set())

def test_everything_is_trained_again_after_the_stages():
    model = DualEncoder.from_profile(get_profile('smoke', dict(width=2, train_word_table=True)))
    model.train_only('audio').train_only('text', True).train_only('both')
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
