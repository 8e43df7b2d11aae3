"A saved model gives the same vectors and scores in sentence-transformers and mteb, and can be trained there."
import importlib
import json
import sys
from types import SimpleNamespace

import librosa
import numpy as np
import pytest
import soundfile as sf
import torch
from sentence_transformers import SentenceTransformer

from cmlf.appendix.sentence import DualEncoderModule, MtebEncoder
from cmlf.core import CmlfError, rng, seed_everything
from cmlf.encoders import DualEncoder, ResNet38, TextEncoder
from cmlf.metrics import retrieval
from cmlf.mining import mine, mined_batches

RATE, CLIPS = 32000, 12
OWNER = np.repeat(np.arange(CLIPS), 2)   # two sentences for each sound

@pytest.fixture(scope='module')
def sounds():
    "Noises of 0.4 to 1.6 s, each around another frequency."
    def noise(i):
        t = np.arange(int((.4 + .4 * (i % 4)) * RATE)) / RATE
        return (np.sin(1000 * 1.4**i * t) * rng(i, 'noise').uniform(-.5, .5, len(t))).astype(np.float32)
    return [noise(i) for i in range(CLIPS)]

@pytest.fixture(scope='module')
def sentences():
    words = 'dog bird rain engine man water bell wind child clock train fire'.split()
    return [f'{"the sound of" * (i % 2)} a {words[c]} {"far away " * (c % 3)}' for i, c in enumerate(OWNER)]

@pytest.fixture(scope='module')
def folder(sounds, sentences, tmp_path_factory):
    "A random model for clips of 0.5 s, with the BatchNorm statistics of the sounds; its vectors are centred, so that their cosines differ."
    seed_everything(3)
    model = DualEncoder(ResNet38(width=2), TextEncoder('tiny', 'mean', dropout=0.), 16, 32)
    model.seconds = .5
    x = model.front_end(model.hop)(torch.from_numpy(np.stack([s[:RATE * 2 // 5] for s in sounds])))
    with torch.no_grad():
        for _ in range(30): model.train().embed_audio(x)
        model.eval().audio_head[-1].bias -= model.embed_audio(x).mean(0)
        model.text_head[-1].bias -= model.embed_text(model.text.tokenize(sentences)).mean(0)
    folder = tmp_path_factory.mktemp('saved')/'model'
    model.save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def model(folder): return DualEncoder.from_pretrained(folder)

@pytest.fixture(scope='module')
def st(folder): return SentenceTransformer(str(folder), trust_remote_code=True, device='cpu')

def close(a, b): return a.shape == b.shape and np.allclose(a, b, atol=1e-5)

def test_vectors_are_ours(st, model, sounds, sentences):
    x, t = model.encode_audio(sounds), model.encode_text(sentences)
    gap = 1 - (x @ x.T)[np.triu_indices(CLIPS, 1)]
    assert gap.min() > 1e-4, 'sounds have different vectors'
    for batch in (1, 5, 32):
        assert close(st.encode(sounds, batch_size=batch), x) and close(st.encode(sentences, batch_size=batch), t)
    assert close(st.encode(sounds[::-1]), x[::-1]) and close(st.encode(sounds[3]), x[3]) and close(st.encode(sentences[3]), t[3])
    assert close(st.encode(sentences, prompt='hear '), model.encode_text([f'hear {s}' for s in sentences]))
    assert not st.training and st.get_embedding_dimension() == 16 and st.modalities == ['text', 'audio']
    assert st.similarity_fn_name == 'cosine' and np.allclose(st.similarity(t, x).numpy(), t @ x.T, atol=1e-5)

def test_every_form_of_a_sound(st, sounds, tmp_path):
    wave, two = sounds[3], np.stack([sounds[3] * .5, sounds[3] * 1.5])   # two channels, with the same average
    sf.write(tmp_path/'a.wav', wave, RATE, subtype='FLOAT')
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=torch.tensor(two), sample_rate=RATE))
    forms = [wave, torch.tensor(wave), two, dict(array=wave, sampling_rate=RATE), dict(array=two.tolist(), sampling_rate=RATE),
             {'audio': dict(array=wave, sampling_rate=RATE)}, {'audio': tmp_path/'a.wav'}, tmp_path/'a.wav', str(tmp_path/'a.wav'), decoder]
    x = st.encode(wave)
    for form in forms: assert close(st.encode([form])[0], x), form
    other = librosa.resample(wave, orig_sr=RATE, target_sr=44100)
    assert st.encode(dict(array=other, sampling_rate=44100)) @ x > .9999
    assert st.encode(dict(array=wave, sampling_rate=24000)) @ x < .9999

def test_sentence_transformers_saves_what_both_can_load(st, sounds, sentences, tmp_path):
    st.save_pretrained(str(tmp_path/'again'))
    ours = DualEncoder.from_pretrained(tmp_path/'again')
    theirs = SentenceTransformer(str(tmp_path/'again'), trust_remote_code=True, device='cpu')
    assert close(ours.encode_audio(sounds), st.encode(sounds)) and close(theirs.encode(sentences), st.encode(sentences))
    ours.save_pretrained(tmp_path/'third')
    written = [json.loads((f/'modules.json').read_text()) for f in (tmp_path/'again', tmp_path/'third')]
    assert written[0] == written[1]

def test_a_model_is_saved_without_sentence_transformers(folder, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sentence_transformers', None)   # importing it is an error
    model.save_pretrained(tmp_path/'m')
    assert (tmp_path/'m'/'modules.json').read_text() == (folder/'modules.json').read_text()
    monkeypatch.delitem(sys.modules, 'cmlf.appendix.sentence')
    with pytest.raises(CmlfError, match='^sentence-transformers 5.4 or newer is needed'): importlib.import_module('cmlf.appendix.sentence')

def test_a_model_with_clap_as_encoder(sounds, sentences, tmp_path):
    "Its front end works at 48 kHz, and its heads have another form."
    from cmlf.config import get_profile
    seed_everything(0)
    clap = DualEncoder.from_profile(get_profile('smoke', dict(encoder='clap', seconds=1.))).eval()
    clap.seconds = 1.
    clap.save_pretrained(tmp_path/'clap')
    st = SentenceTransformer(str(tmp_path/'clap'), trust_remote_code=True, device='cpu')
    x = clap.encode_audio(sounds)
    assert close(st.encode(sounds), x) and close(st.encode(sentences), clap.encode_text(sentences))
    assert st.get_embedding_dimension() == x.shape[1]

def test_a_long_sentence_is_cut(st, model):
    long = 'rain ' * 600
    with pytest.raises(CmlfError, match='512 fit'): model.encode_text([long])
    assert close(st.encode([long, 'rain']), model.encode_text(['rain ' * 510, 'rain']))

@pytest.mark.parametrize('items,message', [
    ([np.zeros(100, np.float32)], 'sound 0 of a batch: too short'), ([np.zeros((3, 8, 8))], 'image'), (['rain', np.zeros(9999)], 'one call per|two calls'),
    ([dict(array=np.zeros(9999))], 'sampling_rate'), (['no/such.wav', {'audio': 'no/such.wav'}], 'one call per|two calls'), ([{'audio': 'no/such.wav'}], 'no such file')])
def test_bad_input(st, items, message):
    with pytest.raises((CmlfError, ValueError), match=message): st.encode(items)

def test_a_model_without_a_clip_length(model):
    other = DualEncoder(ResNet38(width=1), TextEncoder('tiny'), 8, 8)
    with pytest.raises(CmlfError, match='model.seconds'): DualEncoderModule(other)

@pytest.mark.parametrize('side', ['t2a', 'a2t'])
def test_evaluator(st, model, sounds, sentences, side):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    texts, clips = {f't{i}': s for i, s in enumerate(sentences)}, {f'a{i}': s for i, s in enumerate(sounds)}
    of_text = {f't{i}': {f'a{c}'} for i, c in enumerate(OWNER)}
    of_clip = {f'a{c}': {f't{i}' for i in np.flatnonzero(OWNER == c)} for c in range(CLIPS)}
    given = (texts, clips, of_text) if side == 't2a' else (clips, texts, of_clip)
    scores = InformationRetrievalEvaluator(*given, accuracy_at_k=[1, 5, 10])(st)
    ours = getattr(retrieval(model.encode_audio(sounds), model.encode_text(sentences), OWNER), side)
    for k in (1, 5, 10): assert 100 * scores[f'cosine_accuracy@{k}'] == pytest.approx(ours[f'R@{k}'])

def test_training_there_on_mined_batches(folder, sounds, sentences, tmp_path):
    "An epoch on pairs of sentence and sound: both encoders learn, and the checkpoint is a model of ours."
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    st = SentenceTransformer(str(folder), trust_remote_code=True, device='cpu')
    before = {k: v.clone() for k, v in st.state_dict().items()}
    vectors, seen = st.encode(sounds), []
    for i, s in enumerate(sounds): sf.write(tmp_path/f'{i}.wav', s, RATE, subtype='FLOAT')
    rows = Dataset.from_dict(dict(sentence=sentences[::2], sound=[str(tmp_path/f'{i}.wav') for i in range(CLIPS)]))
    loss = MultipleNegativesRankingLoss(st)
    forward = loss.forward
    loss.forward = lambda features, labels: (seen.append([st.tokenizer.decode(i, skip_special_tokens=True) for i in features[0]['input_ids']]),
                                             forward(features, labels))[1]
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True, report_to='none', save_strategy='epoch',
        disable_tqdm=True, seed=1, batch_sampler=mined_batches(vectors, 'hard', sweeps=2))
    SentenceTransformerTrainer(st, args, rows, loss=loss).train()
    batches = mine(vectors, 4, 'hard', sweeps=2, seed=1).batches
    assert seen == [[' '.join(rows['sentence'][i].split()) for i in some] for some in batches.tolist()]
    changed = {k.split('.')[2] for k, v in st.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'audio', 'audio_head', 'text', 'text_head'}
    saved = DualEncoder.from_pretrained(tmp_path/'checkpoint-3')
    assert close(saved.encode_audio(sounds), st.encode(sounds)) and not close(saved.encode_audio(sounds), vectors)

# --- mteb

def task(side, sounds, sentences):
    "A retrieval task of mteb: sounds as arrays at 44.1 kHz."
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    texts = Dataset.from_dict(dict(id=[f't{i}' for i in range(len(sentences))], text=sentences))
    clips = Dataset.from_dict(dict(id=[f'a{i}' for i in range(CLIPS)], audio=[dict(array=s, sampling_rate=44100) for s in sounds]))
    pairs = [(f't{i}', f'a{c}') for i, c in enumerate(OWNER)]

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f'Noises{side.upper()}Retrieval', description='Noises and sentences.', reference=None, dataset=dict(path='none', revision='1'),
            type='Any2AnyRetrieval', category=side, modalities=['text', 'audio'], eval_splits=['test'], eval_langs=['eng-Latn'], main_score='hit_rate_at_5',
            date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation='')

        def load_data(self, **_):
            queries, corpus = (texts, clips) if side == 't2a' else (clips, texts)
            relevant = {}
            for t, a in pairs:
                query, found = (t, a) if side == 't2a' else (a, t)
                relevant.setdefault(query, {})[found] = 1
            self.dataset = {'default': {'test': dict(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)}}
            self.data_loaded = True
    return Task()

@pytest.mark.parametrize('side', ['t2a', 'a2t'])
def test_mteb(folder, model, sounds, sentences, side):
    import mteb
    encoder = MtebEncoder(folder, device='cpu', training_datasets={'Noises'})
    assert encoder.mteb_model_meta.name == 'cmlf/model' and encoder.mteb_model_meta.training_datasets == {'Noises'}
    result = mteb.evaluate(encoder, task(side, sounds, sentences), cache=None, co2_tracker=False, show_progress_bar=False)
    scores = result.task_results[0].scores['test'][0]
    x = model.encode_audio([dict(array=s, sampling_rate=44100) for s in sounds])
    similarity = model.encode_text(sentences) @ x.T
    gaps = np.diff(np.sort(similarity if side == 't2a' else similarity.T))
    assert gaps.min() > 1e-6, 'no ties'
    ours = getattr(retrieval(x, model.encode_text(sentences), OWNER), side)
    assert 0 < ours['R@1'] < ours['R@5'] < 100
    for k in (1, 5, 10): assert 100 * scores[f'hit_rate_at_{k}'] == pytest.approx(ours[f'R@{k}'], abs=.01)
    if side == 't2a': assert 100 * scores['recall_at_1'] == pytest.approx(ours['R@1'], abs=.01)

def test_mteb_rows_with_sentence_and_sound(model, sounds, sentences):
    from datasets import Dataset
    from torch.utils.data import DataLoader
    encoder = MtebEncoder(model, device='cpu')
    def load(**columns):
        return DataLoader(Dataset.from_dict(columns), batch_size=5, collate_fn=lambda b: {k: [r[k] for r in b] for k in b[0]})
    both = encoder.encode(load(text=sentences[::2], audio=[dict(array=s, sampling_rate=RATE) for s in sounds]))
    mean = model.encode_text(sentences[::2]) + model.encode_audio(sounds)
    assert close(both, mean / np.linalg.norm(mean, axis=1, keepdims=True))
    assert np.allclose(encoder.similarity_pairwise(both, both), 1, atol=1e-5)
    with pytest.raises(CmlfError, match='should have text or audio'): encoder.encode(load(image=[1, 2]))
