"""Execute the notebooks in place, and check that what is committed is what their code gave.

    python tools/notebooks.py                 execute those whose code changed since they were last executed
    python tools/notebooks.py 03_data table1  execute these
    python tools/notebooks.py --all           execute all
    python tools/notebooks.py --check         execute nothing; name everything that must not be committed
"""
import argparse, base64, hashlib, io, os, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
IMAGE_BYTES, SOUND_BYTES, ALL_BYTES = 80_000, 25_000, 12_000_000
KEPT = 'executed'  # the key in a notebook's metadata; settings.ini lets nbdev_clean keep it

# --- what a page is ---

def pages(names=()) -> list[Path]:
    "The notebooks with these names, as `03_data` or `tables/table1`; all of them without names."
    found = sorted(p for p in NBS.rglob('*.ipynb')
                   if not any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts))
    if not names: return found
    wanted = [re.sub(r'\.ipynb$', '', n.removeprefix('nbs/')) for n in names]
    unknown = [n for n in wanted if not any(_is(p, n) for p in found)]
    if unknown: sys.exit(f'no such notebook under nbs/: {", ".join(unknown)}')
    return [p for p in found if any(_is(p, n) for n in wanted)]

def _is(path, name): return name in (path.stem, path.relative_to(NBS).with_suffix('').as_posix())

def read(path): return nbformat.read(path, as_version=4)

def code_cells(nb) -> list: return [c for c in nb.cells if c.cell_type == 'code' and c.source.strip()]

def code_hash(nb) -> str:
    "Changes with the source of any code cell, and with their order; prose and outputs do not count."
    sources = [c.source.strip() for c in code_cells(nb)]
    return hashlib.sha256('\0'.join(sources).encode()).hexdigest()[:16]

def shown(nb) -> int: return sum(bool(c.outputs) for c in code_cells(nb))

def is_stale(nb) -> bool:
    mark = nb.metadata.get(KEPT, {})
    return mark.get('code') != code_hash(nb) or mark.get('outputs') != shown(nb)

# --- execute ---

def not_run(cell) -> bool: return bool(re.search(r'^#\|\s*eval:\s*false', cell.source, re.M))

def execute(path) -> str:
    "Run a notebook in a fresh kernel, in its own folder, and keep what it shows. Returns a line about it."
    from nbclient import NotebookClient
    before, nb, start = path.read_bytes(), read(path), time.monotonic()
    client = NotebookClient(nb, timeout=1800, kernel_name='python3', extra_arguments=['--log-level=ERROR'], coalesce_streams=True,
                            resources={'metadata': {'path': str(path.parent)}})
    left_out = 0
    with client.setup_kernel(env=kernel_env()):
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != 'code': continue
            cell.outputs, cell.execution_count = [], None
            if not_run(cell): left_out += 1
            else: client.execute_cell(cell, i)
    for cell in code_cells(nb): cell.outputs = [o for o in map(tidy, cell.outputs) if o is not None]
    nb.metadata[KEPT] = {'code': code_hash(nb), 'outputs': shown(nb)}
    if path.read_bytes() != before: raise RuntimeError('was edited while it was executed; run it again')
    nbformat.write(nb, path)
    subprocess.run([Path(sys.executable).parent/'nbdev_clean', '--fname', str(path)], cwd=NBS, check=True)
    line = f'{path.relative_to(ROOT)}: {shown(nb)} outputs, {path.stat().st_size / 1e3:.0f} kB, {time.monotonic() - start:.0f} s'
    return line + (f'; {left_out} cells are marked "eval: false" and were not run' if left_out else '')

def plain(error) -> str:
    "What went wrong, without colours and without the whole traceback."
    lines = [l for l in re.sub(r'\x1b\[[\d;]*m', '', str(error)).splitlines() if l.strip()]
    return lines[-1] if len(lines) < 4 else '\n    '.join(['', *lines[2:6], '...', lines[-1]])

def kernel_env() -> dict:
    "One thread, not as a test, and without the data of this machine: pages show what everyone can see."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST' and not k.startswith('CMLF_')}
    return env | {'OMP_NUM_THREADS': '1'}

# --- tidy: the same code gives the same file on every machine ---

def tidy(output):
    "An output without what belongs to one execution: counters, progress bars, addresses, paths; None for stderr."
    if output.output_type == 'stream':
        if output.name == 'stderr': return None
        output.text = tidy_text(re.sub(r'[^\n]*\r(?!\n)', '', output.text))
        return output
    if 'execution_count' in output: output.execution_count = None
    for kind, value in list(output.get('data', {}).items()):
        if kind.startswith('text/') and isinstance(value, str): output.data[kind] = tidy_text(value)
        if kind == 'image/png': output.data[kind] = fewer_colours(value)
    return output

def tidy_text(text) -> str:
    "Addresses, the checkout, the home folder and temporary folders under one name each."
    text = re.sub(r' at 0x[0-9a-fA-F]{6,}', '', text)
    text = re.sub(re.escape(str(ROOT)) + r'(?=/|\b)', '.', text)
    text = re.sub(r'/tmp/(tmp|pytest-)[\w-]+', '/tmp/…', text)
    return re.sub(re.escape(str(Path.home())) + r'(?=/|\b)', '~', text) if Path.home() != Path('/') else text

def fewer_colours(png:str) -> str:
    "A large picture with 256 colours, which a plot does not miss, where that makes it smaller."
    raw = base64.b64decode(png)
    if len(raw) < IMAGE_BYTES / 2: return png
    from PIL import Image
    out = io.BytesIO()
    Image.open(io.BytesIO(raw)).convert('RGB').quantize(256).save(out, 'png', optimize=True)
    return base64.b64encode(min(raw, out.getvalue(), key=len)).decode()

# --- check ---

def faults(path) -> list[str]:
    "Everything in a notebook that must not be committed, each with what to do."
    nb, name = read(path), path.name
    again = f'make notebooks ARGS={path.stem}'
    mark, found = nb.metadata.get(KEPT), []
    if not mark: found.append(f'was never executed: {again}')
    elif mark.get('code') != code_hash(nb): found.append(f'its code changed after it was executed: {again}')
    elif mark.get('outputs') != shown(nb):
        found.append(f'{mark.get("outputs")} cells had outputs when it was executed, now {shown(nb)} have: {again}')
    elif not shown(nb): found.append('shows nothing: end a cell in the value worth seeing')
    for i, cell in enumerate(nb.cells):
        for output in cell.get('outputs', []): found += [f'cell {i}: {fault}' for fault in output_faults(output)]
        if cell.get('execution_count') is not None: found.append(f'cell {i}: has an execution count: make export')
    return [f'{name}: {fault}' for fault in found]

def output_faults(output) -> list[str]:
    kind = output.output_type
    if kind == 'error': return [f'ended in {output.ename}: {output.evalue[:80]}']
    if kind == 'stream':
        return (['a stderr output is kept'] if output.name == 'stderr' else []) + text_faults(output.text)
    found = []
    for mime, value in output.get('data', {}).items():
        if mime.startswith('image/'): found += too_large('a picture', value, mime, IMAGE_BYTES)
        if mime.startswith('audio/'): found += too_large('a sound', value, mime, SOUND_BYTES)
        if mime.startswith('text/'): found += embedded_faults(str(value)) + text_faults(str(value))
    return found

def too_large(what, value, mime, limit) -> list[str]:
    size = len(value) if 'svg' in mime else len(value) * 3 // 4
    return [f'{what} of {size / 1e3:.0f} kB, {limit / 1e3:.0f} kB is the limit'] if size > limit else []

def embedded_faults(html) -> list[str]:
    "Sizes of pictures and sounds inside HTML."
    limits = {'audio': ('a sound', SOUND_BYTES), 'image': ('a picture', IMAGE_BYTES)}
    return [fault for mime, value in re.findall(r'data:((?:audio|image)/[\w.+-]+);base64,([\w+/=]+)', html)
            for fault in too_large(limits[mime[:5]][0], value, mime, limits[mime[:5]][1])]

def text_faults(text) -> list[str]:
    "Paths of one machine and addresses in memory."
    text = re.sub(r'base64,[\w+/=\s]+', '', text)
    paths = [r'/home/\w+', r'/Users/\w+', r'/root\b', r'[A-Z]:\\Users\\\w+', r'\S*/site-packages/']
    if len(ROOT.parts) > 2: paths.append(re.escape(str(ROOT)) + r'\b')
    found = [f'shows a path of one machine, {m.group()}' for p in paths if (m := re.search(p, text))]
    address = re.search(r'\bat 0x[0-9a-fA-F]{6,}', text)
    return found + ([f'shows an address, {address.group()}'] if address else [])

def total_faults() -> list[str]:
    size = sum(p.stat().st_size for p in NBS.rglob('*.ipynb'))
    return [f'nbs/ has {size / 1e6:.1f} MB, {ALL_BYTES / 1e6:.0f} MB is the limit'] if size > ALL_BYTES else []

# --- command line ---

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='notebooks, as 03_data or tables/table1')
    parser.add_argument('--all', action='store_true', help='also those that are up to date')
    parser.add_argument('--check', action='store_true', help='execute nothing, name what must not be committed')
    parser.add_argument('--jobs', type=int, default=1, help='notebooks at a time')
    args = parser.parse_args()
    chosen = pages(args.names)
    if args.check:
        found = [f for p in chosen for f in faults(p)] + total_faults()
        print(*found, sep='\n') if found else print(f'{len(chosen)} notebooks are as their code left them')
        sys.exit(bool(found))
    stale = chosen if args.all or args.names else [p for p in chosen if is_stale(read(p))]
    sys.exit(execute_all(stale, args.jobs, len(chosen) - len(stale)))

def execute_all(stale, jobs, fresh) -> int:
    "Execute these, go on after one that fails; the exit code."
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for path, job in [(p, pool.submit(execute, p)) for p in stale]:
            try: print(job.result(), flush=True)
            except Exception as e:
                failed += 1
                print(f'{path.relative_to(ROOT)} was left as it is: {plain(e)}', file=sys.stderr, flush=True)
    if fresh: print(f'{fresh} notebooks were up to date')
    found = [f for p in stale for f in faults(p)] + total_faults()
    print(*found, sep='\n', file=sys.stderr)
    return bool(failed or found)

if __name__ == '__main__': main()
