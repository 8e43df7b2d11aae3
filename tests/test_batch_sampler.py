"Batches that reach the loss in PyTorch's DataLoader and in the trainer of sentence-transformers are the mined ones."
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cmlf.batches import bag_of_words
from cmlf.core import CmlfError, rng
from cmlf.mining import MinedBatchSampler, mine, mined_batches

N, B = 44, 8   # four rows are dropped in each epoch

@pytest.fixture(scope='module')
def rows():
    "N pairs of sentences; their words are drawn from six topics."
    words, r = np.array('dog barks rain falls man speaks bird sings engine runs water flows'.split()).reshape(6, 2), rng(0, 'pairs')
    topic = r.integers(6, size=N)
    anchor = [f'{words[t, 0]} {words[t, 1]} {words[r.integers(6), 0]} number {i}' for i, t in enumerate(topic)]
    return dict(anchor=anchor, positive=[f'{a} again' for a in anchor])

@pytest.fixture(scope='module')
def vectors(rows): return bag_of_words(rows['anchor'], 8).astype(np.float64)

@pytest.fixture(scope='module')
def groups(): return np.repeat(np.arange(N // 2), 2)

OPTIONS = dict(neighbours=4, skip=1, share=.6, drop='random', sweeps=3)

@pytest.mark.parametrize('kind,options', [('easy', dict(sweeps=1)), ('random', {}), ('median', dict(sweeps=2)), ('hard', dict(sweeps=2)), ('hard', OPTIONS)])
def test_epochs_are_those_of_mine(vectors, groups, kind, options):
    sampler = MinedBatchSampler(vectors, B, kind, groups=groups, seed=3, **options)
    loader = DataLoader(range(N), batch_sampler=sampler, collate_fn=list)
    expected = [mine(vectors, B, kind, groups=groups, seed=3, epoch=epoch, **options).batches.tolist() for epoch in range(2)]
    for epoch in (1, 1, 0):   # in any order, and twice
        sampler.set_epoch(epoch)
        assert list(sampler) == list(loader) == expected[epoch] and len(loader) == len(sampler) == N // B
        assert all(type(i) is int for some in sampler for i in some)
    assert expected[0] != expected[1]
    assert list(sampler) != list(MinedBatchSampler(vectors, B, kind, groups=groups, seed=4, **options))

@pytest.mark.parametrize('change,message', [
    (dict(embeddings=np.ones(N)), 'vectors of shape'), (dict(embeddings=np.zeros((N, 3))), 'all zeros'), (dict(kind='hardest'), 'unknown kind of batch'),
    (dict(batch_size=N + 1), f'{N} vectors do not fill a batch'), (dict(batch_size=1), 'batch_size=1'), (dict(groups=np.arange(3)), 'group'),
    (dict(neighbours=3), 'divisor'), (dict(share=0.), 'share'), (dict(drop='all'), "'all'"), (dict(sweeps=-1), 'sweeps')])
def test_bad_input_of_the_sampler(vectors, change, message):
    with pytest.raises(CmlfError, match=message): MinedBatchSampler(**dict(dict(embeddings=vectors, batch_size=B, kind='hard'), **change))

def test_bad_epoch(vectors):
    with pytest.raises(CmlfError, match='epoch=-1'): MinedBatchSampler(vectors, B, 'random').set_epoch(-1)

# --- the trainer of sentence-transformers

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A random BERT of one layer as a sentence-transformers model."
    import transformers
    from cmlf.appendix.bert import packaged_minilm
    folder = tmp_path_factory.mktemp('bert')
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_minilm())
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

class Recorded:
    "Trains, and keeps the sentences of each batch that the loss gets."
    def __init__(self, folder, out, rows, batch_sampler, eval_rows=None, resume=None, **args):
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        model = SentenceTransformer(str(folder), device='cpu')
        loss, seen = MultipleNegativesRankingLoss(model), []
        before = loss.forward
        def forward(features, labels):
            texts = [model.tokenizer.batch_decode(f['input_ids'], skip_special_tokens=True) for f in features]
            seen.append((torch.is_grad_enabled(), list(zip(*texts))))
            return before(features, labels)
        loss.forward = forward
        args = SentenceTransformerTrainingArguments(str(out), per_device_train_batch_size=B, per_device_eval_batch_size=B, batch_sampler=batch_sampler,
                                                    use_cpu=True, report_to='none', disable_tqdm=True, **args)
        data = {k: Dataset.from_dict(v) for k, v in dict(train_dataset=rows, eval_dataset=eval_rows).items() if v}
        SentenceTransformerTrainer(model, args, loss=loss, **data).train(resume_from_checkpoint=resume)
        self.train = [some for training, some in seen if training]
        self.eval = [some for training, some in seen if not training]

def pairs(rows, batches): return [[(rows['anchor'][i], rows['positive'][i]) for i in some] for some in batches]

def test_the_loss_of_sentence_transformers_gets_the_mined_batches(folder, rows, vectors, groups, tmp_path):
    "Two epochs, evaluation in between; then again from a checkpoint within the second epoch."
    made = mined_batches(vectors, 'hard', groups=groups, sweeps=2, eval_size=12)
    eval_rows = {k: v[:12] for k, v in rows.items()}
    how = dict(num_train_epochs=2, seed=5, save_steps=7, save_strategy='steps', eval_strategy='epoch')
    seen = Recorded(folder, tmp_path, rows, made, eval_rows, **how)
    expected = [pairs(rows, mine(vectors, B, 'hard', groups=groups, seed=5, epoch=e, sweeps=2).batches) for e in range(2)]
    assert seen.train == expected[0] + expected[1] and expected[0] != expected[1]
    assert seen.eval == 2 * pairs(rows, [range(8), range(8, 12)])
    again = Recorded(folder, tmp_path, rows, made, eval_rows, resume=str(tmp_path/'checkpoint-7'), **how)
    assert again.train == expected[1][2:]

def test_a_given_seed_wins_over_the_trainers(vectors):
    called = dict(batch_size=B, drop_last=False, valid_label_columns=[], generator=None, seed=42)
    assert list(mined_batches(vectors, 'hard', seed=1, sweeps=1)(range(N), **called)) == mine(vectors, B, 'hard', seed=1, sweeps=1).batches.tolist()

@pytest.mark.parametrize('make,message', [
    (lambda v: mined_batches(v[0], 'hard'), 'vectors of shape'), (lambda v: mined_batches(v, 'harder'), "did you mean 'hard'"),
    (lambda v: mined_batches(v, 'hard', neighbors=4), "did you mean 'neighbours'"), (lambda v: mined_batches(v, 'hard', eval_size=N), 'told apart'),
    (lambda v: mined_batches(v, 'hard')(range(N - 1), B), f'{N} vectors for a dataset of {N - 1} rows'),
    (lambda v: mined_batches(v, 'hard')(range(N), N + 1), 'do not fill a batch')])
def test_bad_input_of_the_function(vectors, make, message):
    with pytest.raises(CmlfError, match=message): make(vectors)
