"""Compare mining with other methods on AudioCaps captions; time and memory on synthetic vectors.

    python benchmarks/mining.py --captions /path/to/csv_files

Captions are encoded once by the packaged MiniLM and stored in runs/mining; the report contains no
captions. Every line of the tables is computed in a new process, so that its peak memory can be
measured. Writes mining.md, .csv, .json and .png to reports/benchmarks. `--parts growth` repeats one
part; `--vectors 8000` is a quick trial with few captions, which writes to runs/mining.
"""
import argparse, os, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cmlf import mining
from cmlf.appendix import batch_search, bounds as dual, neighbours
from cmlf.batches import (Task, easy_bound, mean_similarity, mine_random, random_swaps,
                          unit_vectors, weight_function)
from cmlf.core import (CmlfError, Progress, atomic_path, commit, content_hash, device, has_bf16, log,
                       machine, one_of, prefers_bf16, read_json, rng, write_json, write_text)
from shared import answer, peak_gb, run_job

ROOT, B = Path(__file__).resolve().parent.parent, 32
OURS, SIZES = 'cmlf', (10_000, 100_000, 1_000_000)

# ---- other methods: (x, kind, effort) -> batches (M, B)

def full_batches(order): return order[:len(order) // B * B].view(-1, B)

def greedy(x, kind, effort):
    "Repeat: a random anchor and its 31 most similar (easy: least similar) remaining vectors."
    sign = 1 if kind == 'hard' else -1
    left = torch.ones(len(x), dtype=torch.bool, device=x.device)
    batches = []
    for anchor in torch.from_numpy(rng(0, 'greedy').permutation(len(x))).tolist():
        if not left[anchor]: continue
        if len(batches) == len(x) // B: break
        like = (sign * (x @ x[anchor])).masked_fill_(~left, -9)
        like[anchor] = 9
        batches.append(like.topk(B).indices)
        left[batches[-1]] = False
    return torch.stack(batches)

def cuthill_mckee(x, kind, effort, mean_degree=50):
    "Reverse Cuthill-McKee order of all pairs above a threshold, cut into batches (as GCBS)."
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import reverse_cuthill_mckee
    some = x[torch.from_numpy(rng(0, 'threshold').permutation(len(x))[:512]).to(x.device)]
    least = float((some @ x.T).flatten().topk(512 * (mean_degree + 1)).values[-1])
    key = dual.close_pairs(x, torch.full_like(x[:, 0], least / 2), 0).cpu().numpy()
    i, j = np.divmod(key, len(x))
    graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), (len(x), len(x))).tocsr()
    order = reverse_cuthill_mckee((graph + graph.T).tocsr(), symmetric_mode=True)
    return full_batches(torch.from_numpy(order.astype(np.int64)).to(x.device))

def nearest(x, k):
    "The exact k nearest neighbours of every vector: cosines and indices (N, k)."
    found = []
    for rows in torch.arange(len(x), device=x.device).split(1024):
        w = x[rows] @ x.T
        w[torch.arange(len(rows)), rows] = -2
        found.append(w.topk(k))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

def metis(x, kind, effort, k=50):
    "METIS on the graph of 50 neighbours (as B3); surplus vectors go to similar batches."
    import pymetis
    from scipy.sparse import csr_matrix
    w, at = nearest(x, k)
    ends = np.arange(0, len(x) * k + 1, k)
    weight = (100 * w.clamp_min(.01)).int().cpu().numpy().ravel()
    graph = csr_matrix((weight, at.cpu().numpy().ravel(), ends))
    graph = graph.maximum(graph.T).tocsr()
    _, part = pymetis.part_graph(len(x) // B, xadj=graph.indptr, adjncy=graph.indices,
                                 eweights=graph.data)
    part = torch.tensor(part, device=x.device)
    sums = x.new_zeros(len(x) // B, x.shape[1]).index_add_(0, part, x)
    like = x @ torch.nn.functional.normalize(sums, dim=1).T
    like[torch.arange(len(x)), part] += 2 # prefers its own part
    return batch_search.deferred_acceptance(*like.topk(16), len(sums), B)[0]

def exchange_only(x, kind, effort):
    "Swaps only; hard: local search from the bisection tree, easy: from random batches."
    task = Task(x, len(x) // B, B, None, rng(0, 'exchange'), weight_function(kind), effort)
    if kind == 'hard':
        batches = full_batches(neighbours.bisect(x, task.shuffled(len(x))[:task.m * B], B))
        batch_search.local_search(task, batches, effort)
    else:
        batches, _ = mine_random(task)
        random_swaps(task, batches, effort)
    return batches

METHODS = {'greedy: anchor + 31': greedy, 'reverse Cuthill-McKee (GCBS)': cuthill_mckee,
           'METIS, 50 nearest (B3)': metis, 'exchange only': exchange_only}

# ---- jobs: each runs in a new process and returns JSON values

def load(path):
    x = torch.from_numpy(np.load(path)).to(device())
    return unit_vectors(x)

def compare(vectors, method, kind, effort):
    "One line of the comparison: cosine, seconds, peak memory."
    x, began = load(vectors), time.perf_counter()
    if method in (OURS, 'random'): value = mining.mine(x, B, kind, sweeps=effort).mean_similarity
    else: value = mean_similarity(x, METHODS[method](x, kind, effort))
    return dict(cosine=value, seconds=time.perf_counter() - began, peak_gb=peak_gb())

def bounds(vectors):
    "The easy and the hard bound, and the hard bound after each step."
    x = load(vectors)
    leaves = mining.mine(x, B, 'hard', sweeps=20).leaves()
    m, rows, began = len(x) // B, [], time.perf_counter()
    stages = ['half the 31st cosine, as found', 'dual variables', None,
              'dual variables, second active set']
    stages += [f'triangle inequalities, round {i}' for i in range(1, 6)]
    start = dual.first_dual(x, m, B, leaves=leaves)
    for stage, value in zip(stages, dual.falling_bounds(start, 5)):
        if not stage: continue
        rows.append(dict(step=stage, value=value, seconds=time.perf_counter() - began))
    peak, easy = peak_gb(), easy_bound(x, m, B)
    star = float(nearest(x, B - 1)[0].flatten().topk(m * B * (B - 1)).values.mean())
    guess = dual.sampled_bound(x, m, B, leaves=leaves)
    return dict(easy=easy, hard=min(r['value'] for r in rows), nearest=star, sampled=guess,
                peak_gb=peak, stages=rows)

def pairs_in_batches(batches):
    "All pairs that share a batch, one number per pair."
    i, j = np.triu_indices(B, 1)
    b = np.sort(batches, 1)
    return b[:, i].ravel() * 2**32 + b[:, j].ravel()

def epochs(vectors, kind, effort):
    "Four epochs: mean cosine, and the fraction of pairs in a batch that share one in epoch 0 too."
    x, rows, first = load(vectors), [], None
    for epoch in range(4):
        found = mining.mine(x, B, kind, epoch=epoch, sweeps=effort)
        pairs = pairs_in_batches(found.batches)
        first = pairs if first is None else first
        rows.append(dict(kind=kind, epoch=epoch, cosine=found.mean_similarity,
                         seconds=found.seconds, shared=np.isin(pairs, first).mean()))
    return rows

def negatives(vectors, labels, kind):
    "Numbers of pairs in a batch with equal captions or similar vectors, with and without groups."
    x, g, rows = load(vectors), np.load(labels), []
    for groups in (None, g):
        found = mining.mine(x, B, kind, groups=groups, sweeps={'hard': 20, 'easy': 1}.get(kind))
        h, v = g[found.batches], x[torch.from_numpy(found.batches).to(x.device)]
        same = int((h[:, :, None] == h[:, None]).sum()) - h.size
        alike = sum(int((c @ c.transpose(1, 2) >= .95).sum()) for c in v.split(256)) - h.size
        hit = (np.diff(np.sort(h, 1), axis=1) == 0).any(1).mean()
        rows.append(dict(kind=kind, groups=groups is not None, equal_pairs=same // 2,
                         near_pairs=alike // 2, batches_with_equal=float(hit),
                         cosine=found.mean_similarity, seconds=found.seconds))
    return rows

def synthetic_vectors(n, d=384):
    "Synthetic vectors: n / 200 clusters of different sizes and widths, in 50 larger clusters."
    r = rng(0, 'growth', n)
    themes, topics = (r.normal(size=(k, d)).astype(np.float32) for k in (50, n // 200))
    topics += themes[r.integers(50, size=len(topics))]
    size = r.pareto(2, len(topics)) + .2
    of = r.choice(len(topics), n, p=size / size.sum())
    x = np.empty((n, d), np.float32)
    for rows in np.array_split(np.arange(n), max(1, n // 50_000)):
        noise = r.normal(size=(len(rows), d)).astype(np.float32)
        x[rows] = topics[of[rows]] + noise * r.uniform(.5, 2.5, (len(rows), 1)).astype(np.float32)
    return x

def growth(n, kind, effort):
    "Time and memory for n synthetic vectors, for mining and for its bound."
    x = unit_vectors(torch.from_numpy(synthetic_vectors(n)).to(device()))
    found = mining.mine(x, B, kind, sweeps=effort)
    peak, began = peak_gb(), time.perf_counter()
    bound = found.bound
    return dict(vectors=n, kind=kind, sweeps=effort, cosine=found.mean_similarity,
                seconds=found.seconds, peak_gb=peak, bound=bound, bound_is=found.bound_is,
                bound_seconds=time.perf_counter() - began, bound_peak_gb=peak_gb())

def precision(vectors, kind, effort):
    "Search and bound, with or without bf16 (CMLF_BF16 of this process)."
    x = load(vectors)
    found = mining.mine(x, B, kind, sweeps=effort)
    began = time.perf_counter()
    bound = found.bound
    return dict(bf16=prefers_bf16(), sweeps=effort, cosine=found.mean_similarity, seconds=found.seconds, bound=bound,
                bound_is=found.bound_is, bound_seconds=time.perf_counter() - began, peak_gb=peak_gb())

JOBS = {f.__name__: f for f in (compare, bounds, epochs, negatives, growth, precision)}

def job(name, env=None, **settings):
    "`JOBS[name](**settings)` in a new process, with environment variables `env`."
    given = [str(v) for k, v in settings.items() if k not in ('vectors', 'labels')]
    log(' '.join([name, *given, '...']))
    began, result = time.perf_counter(), run_job(__file__, name, settings, env)
    if isinstance(result, dict) and 'cosine' in result:
        log('    {cosine:.4f}, {seconds:.1f} s, {peak_gb:.2f} GB'.format(**result))
    log(f'    ({time.perf_counter() - began:.0f} s)')
    return result

# ---- captions

def encode(captions):
    "(N, 384) vectors by the packaged MiniLM, mean over tokens; sorted by length, to pad less."
    from cmlf.encoders import TextEncoder
    net = TextEncoder('minilm', 'mean').to(device()).eval()
    order = np.argsort([len(c) for c in captions], kind='stable')
    out = np.empty((len(captions), net.n_out), np.float32)
    with torch.inference_mode(), Progress(len(order), 'captions encoded') as bar:
        for some in np.array_split(order, -(-len(order) // 256)):
            tokens = net.tokenize([captions[i] for i in some])
            out[some] = net({k: v.to(device()) for k, v in tokens.items()}).cpu().numpy()
            bar.step(len(some))
    return out

def prepare(folder, limit, work):
    "Write vectors and labels of the training captions; labels are equal for equal captions."
    from cmlf.data import clean_caption
    table = Path(folder)/'train.csv'
    if not table.exists():
        raise CmlfError(f'{table}: not found; --captions should be the folder of train.csv')
    captions = pd.read_csv(table).caption.tolist()
    path = work/f'captions-{content_hash(captions)}.npy'
    if not path.exists():
        with atomic_path(path) as tmp: np.save(tmp, encode(captions))
    x, stem = np.load(path), str(path)[:-4] + (f'-{limit}' if limit else '')
    pick = np.sort(rng(0, 'limit').permutation(len(x))[:limit or None])
    labels = np.unique([clean_caption(c) for c in captions], return_inverse=True)[1]
    np.save(f'{stem}-x.npy', x[pick])
    np.save(f'{stem}-g.npy', labels[pick])
    return f'{stem}-x.npy', f'{stem}-g.npy'

# ---- parts

HARD = ([(OURS, s) for s in (0, 1, 2, 5, 10, 20, 40, 80, 120, 400)]
        + [('exchange only', s) for s in (2, 8, 40)]
        + [(m, 0) for m in METHODS if m != 'exchange only'])
EASY = ([(OURS, s) for s in (0, 1, 2, 4)] + [('exchange only', s) for s in (20, 100, 300)]
        + [('greedy: anchor + 31', 0)])
LINES = [('random', 'random', 0), *((m, 'hard', s) for m, s in HARD),
         *((m, 'easy', s) for m, s in EASY)]

def compare_all(vectors, labels, sizes):
    limits, rows = job('bounds', vectors=vectors), []
    for method, kind, sweeps in LINES:
        line = job('compare', vectors=vectors, method=method, kind=kind, effort=sweeps)
        bound = limits.get(kind)
        gap = None if bound is None else abs(bound - line['cosine'])
        rows.append(dict(method=method, kind=kind, sweeps=sweeps, **line, bound=bound, gap=gap))
    return dict(rows=rows, bounds=limits)

def all_epochs(vectors, labels, sizes):
    efforts = dict(hard=20, easy=1)
    return [r for k, s in efforts.items() for r in job('epochs', vectors=vectors, kind=k, effort=s)]

def all_negatives(vectors, labels, sizes):
    kinds = 'easy', 'random', 'hard'
    return [r for k in kinds for r in job('negatives', vectors=vectors, labels=labels, kind=k)]

def all_growth(vectors, labels, sizes):
    wanted = [('hard', 20, n) for n in sizes] + [('easy', 1, n) for n in sizes if n <= 100_000]
    return [job('growth', n=n, kind=k, effort=s) for k, s, n in wanted]

def all_precision(vectors, labels, sizes):
    "Without bf16, as on an older processor, and with it where the processor has it."
    return [job('precision', env=dict(CMLF_BF16=on), vectors=vectors, kind='hard', effort=20)
            for on in ('false', 'true')[:1 + has_bf16()]]

PARTS = dict(compare=compare_all, precision=all_precision, epochs=all_epochs, negatives=all_negatives, growth=all_growth)

# ---- report

def first(rows, **wanted): return next(r for r in rows if all(r[k] == v for k, v in wanted.items()))

def line_text(r): return f'{r["cosine"]:.4f} in {r["seconds"]:.1f} s (`sweeps={r["sweeps"]}`)'

def best_within(rows, seconds, pick):
    "The best line within a time limit."
    quick = [r for r in rows if r['seconds'] <= seconds]
    return line_text(pick(quick, key=lambda r: r['cosine'])) if quick else 'nothing'

def against_greedy(ours, greedy):
    as_good = [r for r in ours if r['cosine'] >= greedy['cosine']]
    if not as_good: return 'not reached'
    quick = min(as_good, key=lambda r: r['seconds'])
    return f'{line_text(quick)}, {greedy["seconds"] / quick["seconds"]:.1f} times as fast'

def verdicts(rows):
    "The targets, each with the result."
    ours = [r for r in rows if r['method'] == OURS]
    hard, easy = ([r for r in ours if r['kind'] == k] for k in ('hard', 'easy'))
    greedy = first(rows, method='greedy: anchor + 31', kind='hard')
    return [f'- hard, at least 0.72 within 15 s: {best_within(hard, 15, max)}',
            f'- hard, the best within 60 s: {best_within(hard, 60, max)}',
            f"- greedy's quality ({greedy['cosine']:.4f} in {greedy['seconds']:.1f} s) "
            f'in a tenth of its time: {against_greedy(hard, greedy)}',
            f'- easy, at most 0.1953 within 10 s: {best_within(easy, 10, min)}',
            f'- peak memory of ours, under 2 GB: {max(r["peak_gb"] for r in hard + easy):.2f} GB']

FORMATS = dict(cosine='.4f', seconds='.1f', peak_gb='.2f', bound='.4f', gap='.4f', value='.4f',
               shared='.1%', batches_with_equal='.1%', equal_pairs=',', near_pairs=',', vectors=',',
               bound_seconds='.1f', bound_peak_gb='.2f')

def table(rows):
    "Rows as a markdown table."
    t = pd.DataFrame(rows)
    show = lambda v, form: '' if v is None or v != v else format(v, form)
    for c, form in FORMATS.items():
        if c in t: t[c] = t[c].map(lambda v: show(v, form))
    return t.to_markdown(index=False, disable_numparse=True)

def best_first(rows):
    return sorted(rows, key=lambda r: (r['kind'], r['cosine'] * (1 - 2 * (r['kind'] == 'hard'))))

def compare_section(c):
    b = c['bounds']
    return f"""## Comparison with other methods

{chr(10).join(verdicts(c['rows']))}

{table(best_first(c['rows']))}

`sweeps` is the effort of each method (ours: passes over all vectors; exchange: passes over pairs of
batches). With 0 sweeps, ours is only principal-axis bisection (hard), or the strata in order
(easy). `peak_gb` is the peak memory of the whole process, of which torch uses about 0.4.

![quality against seconds](mining.png)

## The bound for hard batches

The mean cosine of the 31 nearest neighbours is {b['nearest']:.4f}. The bound from 4,096 rows,
without triangle inequalities, is {b['sampled']:.4f}. Peak memory {b['peak_gb']:.2f} GB.

{table(b['stages'])}
"""

def precision_section(rows):
    slow = first(rows, bf16=False)
    return f"""## With and without bf16

- hard, at least 0.72 within 12 s without bf16: {line_text(slow)}
- the bound within 100 s without bf16: {slow['bound']:.4f} ({slow['bound_is']}) in {slow['bound_seconds']:.1f} s

{table(rows)}

The search is in float32 everywhere. The bound lists near pairs in bf16 where that is faster; it is a proof in either case.
Without bf16 is measured by `CMLF_BF16=false`.
"""

def epochs_section(rows):
    return f"""## From epoch to epoch

{table(rows)}

`shared` is the fraction of the pairs in a batch that share a batch in epoch 0 too.
"""

def negatives_section(rows):
    return f"""## False negatives

The table counts pairs in one batch that have equal captions, or a cosine of 0.95 or more. It also
has the fraction of batches with equal captions. The paper's procedure is without groups.

{table(rows)}
"""

def growth_section(rows):
    return f"""## Time and memory

Synthetic clustered vectors, 384-d. `peak_gb` is measured before the bound is computed.

{table(rows)}
"""

SECTIONS = dict(compare=compare_section, precision=precision_section, epochs=epochs_section, negatives=negatives_section,
                growth=growth_section)

def report(found):
    "The report as markdown."
    on = found['machine']
    head = f"""# Mining

`python benchmarks/mining.py --captions CSV_FOLDER`: {found['vectors']:,} captions of AudioCaps,
{found['repeats']:,} of them repeat an earlier one; MiniLM, 384-d; batches of {B}.
Measured on {on['device']}, {on['name']}, {on['cores']} cores ({on['cpu']}), {on['threads']} threads,
{'with' if on['bf16'] else 'without'} bf16; commit {found['commit']}.
"""
    return '\n'.join([head, *(SECTIONS[p](found[p]) for p in PARTS if p in found)])

def draw(rows, path):
    "Quality against seconds, hard and easy."
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for ax, kind in zip(axes, ('hard', 'easy')):
        lines = pd.DataFrame([r for r in rows if r['kind'] == kind])
        for method, some in lines.groupby('method', sort=False):
            ax.plot(some.seconds, some.cosine, 'o-', label=method)
        ax.axhline(first(rows, kind=kind)['bound'], ls='--', color='k', label='bound')
        ax.axhline(first(rows, kind='random')['cosine'], ls=':', color='gray', label='random')
        ax.set(xscale='log', xlabel='seconds', ylabel='mean cosine in batches', title=kind)
    axes[0].legend(fontsize=8)
    with atomic_path(path) as tmp: fig.savefig(tmp, dpi=110)

def write(found, out):
    write_json(out/'mining.json', found)
    write_text(out/'mining.md', report(found))
    if 'compare' in found:
        columns = ['method', 'kind', 'sweeps', 'cosine', 'bound', 'gap', 'seconds', 'peak_gb']
        lines = pd.DataFrame(found['compare']['rows'])[columns]
        write_text(out/'mining.csv', lines.round(6).to_csv(index=False))
        draw(found['compare']['rows'], out/'mining.png')

def arguments():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument('--captions', default=os.environ.get('CMLF_AUDIOCAPS_CSV'),
                        help='folder of the csv files (CMLF_AUDIOCAPS_CSV)')
    parser.add_argument('--parts', default=','.join(PARTS),
                        help='parts to measure (default: %(default)s)')
    parser.add_argument('--vectors', type=int, default=0,
                        help='a quick trial with this number of captions, and small synthetic sets')
    parser.add_argument('--runs', default=os.environ.get('CMLF_RUNS', ROOT/'runs'), type=Path)
    parser.add_argument('--job', help=argparse.SUPPRESS)
    return parser.parse_args()

def main():
    args = arguments()
    if args.job: return answer(args.job, JOBS)
    if not args.captions:
        raise CmlfError('no captions: give the folder of the AudioCaps csv files by --captions '
                        'or CMLF_AUDIOCAPS_CSV')
    parts = [one_of(p, PARTS, 'part') for p in args.parts.split(',')]
    work = args.runs/'mining'
    work.mkdir(parents=True, exist_ok=True)
    out = work if args.vectors else ROOT/'reports'/'benchmarks'
    vectors, labels = prepare(args.captions, args.vectors, work)
    g = np.load(labels)
    found = read_json(out/'mining.json') if (out/'mining.json').exists() else {}
    found.update(vectors=len(g), repeats=len(g) - len(np.unique(g)), machine=machine())
    found['commit'] = commit()
    for part in parts:
        found[part] = PARTS[part](vectors, labels, (1_000, 10_000) if args.vectors else SIZES)
        write(found, out)
    log(f'{out/"mining.md"} written')

if __name__ == '__main__':
    try: main()
    except CmlfError as e: log(f'mining: {e}'); sys.exit(2)
