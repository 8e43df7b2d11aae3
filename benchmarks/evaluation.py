"""Compare the evaluation of retrieval with other ways to rank; time and memory of a very large test set.

    python benchmarks/evaluation.py

957 clips and 4,785 captions are the test set of AudioCaps; the vectors are random, 1,024-d. All methods must find the same
ranks, in both directions, or the script ends with an error. Every measurement runs in a new process, so that its number of
threads can be set and its peak memory measured. Writes evaluation.md, .csv, .json and .png to reports/benchmarks. `--parts
methods` repeats one part; `--quick` is a trial with a smaller large set, which writes to runs/evaluation.
"""
import argparse, os, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cmlf.core import CmlfError, atomic_path, commit, log, machine, one_of, read_json, rng, write_json, write_text
from cmlf.metrics import retrieval, retrieval_from_similarity
from shared import answer, peak_gb, run_job, threads_of

ROOT, D, CAPTIONS = Path(__file__).resolve().parent.parent, 1024, 5
OURS = 'cmlf'

# ---- test sets: float32 vectors, a caption is its clip and noise

def test_set(clips, noise=9.):
    "(audio, text, owner): five captions per clip, in order."
    r, owner = rng(0, 'evaluation', clips), np.repeat(np.arange(clips), CAPTIONS)
    audio, text = r.standard_normal((clips, D), np.float32), np.empty((len(owner), D), np.float32)
    for rows in np.array_split(np.arange(len(owner)), 1 + len(owner) // 10_000):
        text[rows] = audio[owner[rows]] + noise * r.standard_normal((len(rows), D), np.float32)
    return audio, text, owner

def unit(x): return x / np.linalg.norm(x, axis=1, keepdims=True)

def cosines(audio, text): return unit(text) @ unit(audio).T

# ---- other methods: ranks (text to audio, audio to text); without ties

def cos_sim(a, b):
    "As in sentence-transformers, which the peer project calls for each query."
    return torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T

def peer_loop(audio, text):
    "As in XinhaoMei/audio-text_retrieval: cosines, argsort and search, for one query after the other."
    t2a, a2t = np.zeros(len(text)), np.zeros(len(audio))
    for i in range(len(audio)):
        d = cos_sim(torch.Tensor(text[5 * i:5 * i + 5]), torch.Tensor(audio)).numpy()
        for j in range(5): t2a[5 * i + j] = np.where(np.argsort(d[j])[::-1] == i)[0][0]
    for i in range(len(audio)):
        d = cos_sim(torch.Tensor(audio[i:i + 1]), torch.Tensor(text)).squeeze(0).numpy()
        order = np.argsort(d)[::-1]
        a2t[i] = min(np.where(order == j)[0][0] for j in range(5 * i, 5 * i + 5))
    return t2a, a2t

def query_loop(audio, text):
    "The same loop, but all vectors are normalised once, before it."
    audio, text = unit(audio), unit(text)
    t2a = [np.where(np.argsort(audio @ v)[::-1] == i // 5)[0][0] for i, v in enumerate(text)]
    a2t = []
    for i, v in enumerate(audio):
        order = np.argsort(text @ v)[::-1]
        a2t.append(min(np.where(order == j)[0][0] for j in range(5 * i, 5 * i + 5)))
    return np.array(t2a), np.array(a2t)

def argsort_loop(S):
    "Argsort and search, for one query after the other, of a given matrix."
    t2a = [np.where(np.argsort(row)[::-1] == i // 5)[0][0] for i, row in enumerate(S)]
    a2t = []
    for i, column in enumerate(S.T):
        order = np.argsort(column)[::-1]
        a2t.append(min(np.where(order == j)[0][0] for j in range(5 * i, 5 * i + 5)))
    return np.array(t2a), np.array(a2t)

def first_places(place, S):
    "Ranks from the places (T, C) of all clips, and the places (T, C) of all captions."
    own = np.arange(len(S)) // 5
    t2a, a2t = (p[np.arange(len(S)), own] for p in place)
    return t2a, a2t.reshape(-1, 5).min(1)

def argsort_all(S):
    "Argsort of all queries at once, twice: the inverse of an order has the places."
    return first_places([(-S).argsort(1).argsort(1), (-S).argsort(0).argsort(0)], S)

def torch_argsort(S):
    "As in LAION-AI/CLAP: argsort of all queries at once in torch, then a search."
    S, own = torch.from_numpy(S), torch.arange(len(S)) // 5
    t2a = torch.where(S.argsort(1, descending=True) == own[:, None])[1]
    order = S.T.argsort(1, descending=True)
    a2t = (order // 5 == torch.arange(len(order))[:, None]).int().argmax(1)
    return t2a.numpy(), a2t.numpy()

def rankdata(S):
    from scipy.stats import rankdata
    return first_places([rankdata(-S, axis=1) - 1, rankdata(-S, axis=0) - 1], S)

def ours(audio, text): return ranks(retrieval(audio, text, np.arange(len(text)) // 5))

def ours_from_matrix(S): return ranks(retrieval_from_similarity(S, np.arange(len(S)) // 5))

def ranks(r): return r.t2a_ranks, r.a2t_ranks

# (input, name, function, repetitions)
METHODS = [('vectors', 'loop of Mei et al.', peer_loop, 2), ('vectors', 'loop, normalised once', query_loop, 3),
           ('vectors', OURS, ours, 15),
           ('matrix', 'argsort loop', argsort_loop, 7), ('matrix', 'numpy argsort', argsort_all, 5),
           ('matrix', 'torch argsort', torch_argsort, 5), ('matrix', 'scipy rankdata', rankdata, 5),
           ('matrix', OURS, ours_from_matrix, 25)]

# ---- jobs: each runs in a new process and returns JSON values

def seconds(f, times):
    "The shortest of several runs, and the result."
    best = np.inf
    for _ in range(times):
        began = time.perf_counter()
        result = f()
        best = min(best, time.perf_counter() - began)
    return best, result

def methods(clips):
    "Seconds of every method; an error if its ranks differ from those of the loop."
    audio, text, _ = test_set(clips)
    given = dict(vectors=(audio, text), matrix=(cosines(audio, text),))
    truth, rows = argsort_loop(cosines(*(x.astype(float) for x in (audio, text)))), []
    for what, name, f, times in METHODS:
        best, found = seconds(lambda: f(*given[what]), times)
        if not all(np.array_equal(a, b) for a, b in zip(truth, found)):
            raise CmlfError(f'{name}, from {what}: its ranks differ from those of the loop')
        rows.append(dict(input=what, method=name, seconds=best))
    return rows

def rates():
    "What the machine can do: matrix products and reading memory."
    x, y = torch.from_numpy(rng(0, 'rates').standard_normal((2, 2048, D), np.float32)) # two: x @ x.T could do half the work
    flop, memory = 2 * 2048**2 * D / 1e9, torch.ones(2**26)
    rate = lambda a, b: flop / seconds(lambda: a @ b.T, 9)[0]
    return dict(float32=rate(x, y), numpy_float32=rate(x.numpy(), y.numpy()), float64=rate(x.double(), y.double()),
                read=memory.nbytes / 1e9 / seconds(memory.sum, 9)[0])

def brute_ranks(audio, text, captions, clips):
    "Ranks of some captions and clips by their definition, in float64; ties count half."
    audio64, text64 = unit(audio.astype(float)), unit(text[captions].astype(float))
    t2a = []
    for t, s in zip(captions, (text64 @ audio64.T).astype(np.float32)):
        own = s[t // 5]
        t2a.append((s > own).sum() + ((s == own).sum() - 1) / 2)
    S = np.empty((len(text), len(clips)), np.float32)
    for some in np.array_split(np.arange(len(text)), 1 + len(text) // 5000):
        S[some] = unit(text[some].astype(float)) @ audio64[clips].T
    a2t = []
    for c, s in zip(clips, S.T):
        own, others = s[5 * c:5 * c + 5].max(), np.delete(s, slice(5 * c, 5 * c + 5))
        a2t.append((others > own).sum() + (others == own).sum() / 2)
    return np.array(t2a), np.array(a2t)

def ties(clips):
    "How many ranks are tied, with equal vectors among captions and clips; an error if any rank is wrong."
    audio, text, owner = test_set(clips)
    r = rng(0, 'ties')
    text[r.permutation(len(text))[:len(text) // 4]] = text[r.integers(0, len(text), len(text) // 4)]
    audio[r.permutation(clips)[:clips // 4]] = audio[r.integers(0, clips, clips // 4)]
    found, truth = ranks(retrieval(audio, text, owner)), brute_ranks(audio, text, np.arange(len(text)), np.arange(clips))
    if not all(np.array_equal(a, b) for a, b in zip(truth, found)):
        raise CmlfError('ranks with ties differ from those of float64 brute force')
    return dict(clips=clips, queries=len(text) + clips, tied=int(sum((a % 1 == .5).sum() for a in truth)))

def large(clips, sample=100):
    "Seconds and memory of a large test set; an error if a rank in a random sample is wrong."
    audio, text, owner = test_set(clips, 25.)
    before, began = peak_gb(), time.perf_counter()
    r = retrieval(audio, text, owner)
    took, peak = time.perf_counter() - began, peak_gb()
    t, c = (rng(0, 'sample').permutation(n)[:sample] for n in (len(text), clips))
    if not all(np.array_equal(a, b[i]) for a, b, i in zip(brute_ranks(audio, text, t, c), ranks(r), (t, c))):
        raise CmlfError(f'{clips} clips: a rank differs from float64 brute force')
    return dict(clips=clips, captions=len(text), seconds=took, vectors_gb=(audio.nbytes + text.nbytes) / 2**30,
                before_gb=before, peak_gb=peak, matrix_gb=4 * clips * len(text) / 2**30, checked=2 * sample, score=r.score)

JOBS = {f.__name__: f for f in (methods, rates, ties, large)}

def job(name, threads, **settings):
    "`JOBS[name](**settings)` in a new process."
    log(f'{name}, {threads} threads ...')
    return run_job(__file__, name, settings, threads_of(threads))

def counts(): return sorted({1, os.cpu_count()})

def all_methods(clips, _):
    "Every method with one thread and with all, and how long the machine needs at least."
    found = {}
    for n in counts():
        rate, rows = job('rates', n), job('methods', n, clips=clips)
        least = dict(vectors=2 * D * CAPTIONS * clips**2 / 1e9 / rate['float32'], matrix=4 * CAPTIONS * clips**2 / 1e9 / rate['read'])
        for r in rows:
            best = next(x['seconds'] for x in rows if x['input'] == r['input'] and x['method'] == OURS)
            r.update(ratio=r['seconds'] / best, floor=least[r['input']], over_floor=r['seconds'] / least[r['input']])
        found[str(n)] = dict(rates=rate, rows=rows)
    return dict(clips=clips, threads=found, ties=job('ties', 1, clips=clips))

def all_large(_, clips):
    n = os.cpu_count()
    rate, found = job('rates', n), job('large', n, clips=clips)
    floor = 2 * D * found['clips'] * found['captions'] / 1e9 / rate['float32']
    return found | dict(threads=n, rates=rate, floor=floor, over_floor=found['seconds'] / floor)

PARTS = dict(methods=all_methods, large=all_large)

# ---- report

def plural(n): return f'{n} thread' + 's' * (int(n) > 1)

def table(rows):
    forms = dict(seconds='.4f', ratio='.1f', floor='.4f', over_floor='.1f')
    t = pd.DataFrame(rows)
    for c, form in forms.items(): t[c] = t[c].map(lambda v: format(v, form))
    return t.to_markdown(index=False, disable_numparse=True)

def ratio(rows, method): return next(r['ratio'] for r in rows if r['method'] == method)

def verdicts(m):
    return '\n'.join(
        f'- {plural(n)}: from vectors {ratio(x["rows"], "loop of Mei et al."):.0f} times as fast as the loop of Mei et al. (target: 50), '
        f'{ratio(x["rows"], "loop, normalised once"):.1f} times as fast as the loop with vectors normalised once; '
        f'from a matrix {ratio(x["rows"], "argsort loop"):.0f} times as fast as the argsort loop (target: 50)' for n, x in m['threads'].items())

def rate_line(r):
    return (f'float32 matrix product {r["float32"]:.0f} GFLOP/s in torch ({r["numpy_float32"]:.0f} in numpy), float64 {r["float64"]:.0f}; '
            f'memory is read at {r["read"]:.1f} GB/s')

def threads_section(n, x): return f'### {plural(n).capitalize()}\n\n{table(x["rows"])}\n\nThe machine: {rate_line(x["rates"])}.\n'

def gap(m):
    "The largest distance of ours from the floor, with its cause."
    rows = [(r['over_floor'], n, r) for n, x in m['threads'].items() for r in x['rows'] if r['method'] == OURS]
    over, n, r = max(rows, key=lambda x: x[0])
    what = dict(matrix='a matrix', vectors='vectors')
    causes = dict(matrix='every similarity is compared six times, with the right clip of its row and with the five right captions of its '
                         'column (mAP needs the places of all of them), and each comparison is three passes over a tile in the cache; '
                         'the floor reads the matrix once',
                  vectors='besides the matrix product: exact cosines of the right pairs, entries near them, and the comparisons')
    return f'The largest gap: from {what[r["input"]]} with {plural(n)}, {over:.1f} times the floor. The cause: {causes[r["input"]]}.'

def methods_section(m):
    t = m['ties']
    return f"""## {m['clips']:,} clips, {m['clips'] * CAPTIONS:,} captions

{verdicts(m)}

{chr(10).join(threads_section(n, x) for n, x in m['threads'].items())}
`ratio`: seconds divided by those of cmlf, for the same input. All methods found the same ranks in both directions; cmlf also
has the places of all right captions, for mAP. The floor of `vectors` is the time of one float32 matrix product at the rate of the
machine, the floor of `matrix` the time to read the matrix once.

{gap(m)}

Ties: with a quarter of the vectors replaced by copies of others, {t['tied']:,} of {t['queries']:,} ranks are tied, and all are those of
float64 brute force.

![seconds of each method](evaluation.png)
"""

def large_section(x):
    return f"""## {x['clips']:,} clips, {x['captions']:,} captions

Both directions in {x['seconds']:.0f} s with {plural(x['threads'])}. Peak memory {x['peak_gb']:.2f} GB, of which the vectors have {x['vectors_gb']:.2f} GB
(before the evaluation the peak was {x['before_gb']:.2f} GB). The matrix of similarities would have {x['matrix_gb']:.1f} GB. The floor is {x['floor']:.0f} s: one float32
matrix product at the rate of the machine ({x['rates']['float32']:.0f} GFLOP/s). The evaluation takes {x['over_floor']:.2f} times as long. The ranks of {x['checked']}
random queries are those of float64 brute force.
"""

SECTIONS = dict(methods=methods_section, large=large_section)

def report(found):
    on = found['machine']
    head = f"""# Evaluation

`python benchmarks/evaluation.py`: recall and mAP in both directions; random vectors, {D:,}-d float32, five captions per clip.
Measured on {on['device']}, {on['name']}, {on['cores']} cores ({on['cpu']}), {'with' if on['bf16'] else 'without'} bf16; commit {found['commit']}.
"""
    return '\n'.join([head, *(SECTIONS[p](found[p]) for p in PARTS if p in found)])

def flat(m): return [dict(threads=int(n), **r) for n, x in m['threads'].items() for r in x['rows']]

def draw(m, path):
    "Seconds of each method, for both inputs."
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    t = pd.DataFrame(flat(m))
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    for ax, what in zip(axes, ('vectors', 'matrix')):
        some = t[t.input == what].pivot(index='method', columns='threads', values='seconds')
        some = some.loc[some.max(axis=1).sort_values().index].rename(columns=plural)
        some.plot.barh(ax=ax, width=.75)
        floors = t[t.input == what].floor
        ax.axvline(floors.min(), ls='--', color='k', label='floor')
        ax.set(xscale='log', xlabel='seconds', ylabel='', title=f'from {"embeddings" if what == "vectors" else "a matrix of similarities"}')
    axes[1].legend(fontsize=8)
    axes[0].get_legend().remove()
    with atomic_path(path) as tmp: fig.savefig(tmp, dpi=110)

def write(found, out):
    write_json(out/'evaluation.json', found)
    write_text(out/'evaluation.md', report(found))
    if 'methods' in found:
        write_text(out/'evaluation.csv', pd.DataFrame(flat(found['methods'])).round(6).to_csv(index=False))
        draw(found['methods'], out/'evaluation.png')

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', default=','.join(PARTS), help='parts to measure (default: %(default)s)')
    parser.add_argument('--quick', action='store_true', help='a quick trial: 5,000 clips instead of 50,000')
    parser.add_argument('--runs', default=os.environ.get('CMLF_RUNS', ROOT/'runs'), type=Path)
    parser.add_argument('--job', help=argparse.SUPPRESS)
    return parser.parse_args()

def main():
    args = arguments()
    if args.job: return answer(args.job, JOBS)
    parts = [one_of(p, PARTS, 'part') for p in args.parts.split(',')]
    out = args.runs/'evaluation' if args.quick else ROOT/'reports'/'benchmarks'
    out.mkdir(parents=True, exist_ok=True)
    found = read_json(out/'evaluation.json') if (out/'evaluation.json').exists() else {}
    found.update(machine=machine(), commit=commit())
    for part in parts:
        found[part] = PARTS[part](957, 5_000 if args.quick else 50_000)
        write(found, out)
    log(f'{out/"evaluation.md"} written')

if __name__ == '__main__':
    try: main()
    except CmlfError as e: log(f'evaluation: {e}'); sys.exit(2)
