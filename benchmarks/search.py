"""How fast 100,000 sounds are searched: exactly, and with a graph of neighbours (HNSW).

    python benchmarks/search.py

The vectors are made up: 1,000 clusters, as sounds of 1,000 kinds, in 256 and in 1,024 dimensions. A query is a stored vector
with noise of half its length. Each measurement runs in a new process with its own number of threads. The index is the one
that `cmlf index` builds, and a query is searched as `cmlf search` does, without the time of the text encoder. Writes search.md
and search.json to reports/benchmarks. `--quick` searches 30,000 vectors and writes to runs/search.
"""
import argparse, os, sys, time
from pathlib import Path

import numpy as np
import pandas as pd

from cmlf.appendix.nearest import build_nearest, faiss, recall_of, sample_queries
from cmlf.core import CmlfError, commit, log, machine, rng, write_json, write_text
from shared import answer, peak_gb, run_job, threads_of

ROOT = Path(__file__).resolve().parent.parent

def made_up(n, d):
    "(n, d) float32 unit vectors in 1,000 clusters."
    r = rng(0, 'search', n, d)
    centres = r.standard_normal((1000, d), np.float32)
    x = centres[r.integers(1000, size=n)]
    for some in np.array_split(np.arange(n), 1 + n // 10_000): x[some] += .7 * r.standard_normal((len(some), d), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)

def ms_per_query(index, queries, k=10):
    "Median and 95th percentile, one query at a time."
    times = []
    for q in queries:
        start = time.perf_counter(); index.search(q[None], k); times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times)), float(np.percentile(times, 95))

def measure(n, d, threads):
    x = made_up(n, d)
    faiss().omp_set_num_threads(threads)
    start = time.perf_counter()
    index, facts = build_nearest(x)
    seconds = time.perf_counter() - start
    exact, queries, rows = faiss().IndexFlatIP(d), sample_queries(x, 300), []
    exact.add(x)
    for name, one in {'exact': exact, facts['kind']: index}.items():
        median, worst = ms_per_query(one, queries)
        rows.append(dict(vectors=n, dimensions=d, threads=threads, search=name, median_ms=median, p95_ms=worst,
                         recall_at_10=recall_of(one, exact, queries), build_s=seconds if name == facts['kind'] else 0.))
    return dict(rows=rows, facts=facts, peak_gb=peak_gb())

JOBS = dict(measure=measure)

def page(found):
    m, t = found['machine'], pd.DataFrame([r for part in found['parts'] for r in part['rows']])
    for c, form in dict(median_ms='.2f', p95_ms='.2f', recall_at_10='.3f', build_s='.0f').items(): t[c] = t[c].map(lambda v: format(v, form))
    return '\n'.join(['# Search', '', f"`python benchmarks/search.py`: one query at a time, made-up vectors in 1,000 clusters. Measured on {m['device']}, "
                      f"{m['name']}, {m['cores']} cores ({m['cpu']}); commit {found['commit']}.", '', t.to_markdown(index=False, disable_numparse=True), '',
                      '`recall_at_10` is the share of the 10 nearest vectors of an exact search. `build_s` includes the search for the effort that '
                      'reaches a recall of 0.98.', ''])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='30,000 vectors')
    parser.add_argument('--out', type=Path)
    parser.add_argument('--job', default='', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job: return answer(args.job, JOBS)
    n, out = (30_000, ROOT/'runs'/'search') if args.quick else (100_000, ROOT/'reports'/'benchmarks')
    out, parts = args.out or out, []
    for d, threads in ((256, 1), (256, os.cpu_count()), (1024, os.cpu_count())):
        log(f'{n} vectors of {d} numbers, {threads} threads')
        parts.append(run_job(__file__, 'measure', dict(n=n, d=d, threads=threads), threads_of(threads)))
    found = dict(parts=parts, machine=machine(), commit=commit())
    write_json(out/'search.json', found)
    write_text(out/'search.md', page(found))
    print(page(found))

if __name__ == '__main__':
    try: main()
    except CmlfError as e: log(f'search: {e}'); sys.exit(2)
