"""Hashes of the code that results depend on, stored in pinned.json. After a change of code:

    python tests/pinned.py NAME "a sentence: why results change, or why they stay the same"
"""
import ast, hashlib, json, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).with_name('pinned.json')

_KEYS = ('READS reads run_profile run_config contents _content saved_vectors not_default modules _key key spec _SHAPES _inherited '
         'parents RunSpec _short _ALWAYS _MODULES _DUAL').split()

PARTS = {   # name in RUN_VERSION -> {module: None, or names of the definitions that count}
    'core': {'core': None, 'config': None},
    'features': {'features': None},
    'data': {'data': None, 'layouts': None, 'appendix/corpus_tables': None, 'appendix/entries': None, 'appendix/probes': None},
    'soundscapes': {'soundscapes': None, 'events.toml': None, 'appendix/synthesis': None, 'appendix/recordings': None},
    'batches': {'batches': None},
    'mining': {'mining': None, 'appendix/mixtures': None, 'appendix/neighbours': None, 'appendix/batch_search': None, 'appendix/bounds': None},
    'encoders': {'encoders': None, 'appendix/bert': None, 'appendix/checkpoints': None, 'appendix/dropout': None,
                 'appendix/narrow': None, 'appendix/packing': None, 'appendix/panns': None, 'appendix/models': None, 'appendix/norm_layers': None},
    'loss': {'loss': None}, 'metrics': {'metrics': None, 'appendix/cosines': None}, 
    'training': {'training': None, 'appendix/linear': None, 'appendix/loading': None, 'appendix/distributed': None, 'appendix/resume': None},
    'baselines': {'baselines': None, 'appendix/experts': None},
    'reproduce': {'experiments': None, 'runs': _KEYS}}

class _Bare(ast.NodeTransformer):
    "Removes docstrings; a syntax tree has no comments."
    def generic_visit(self, node):
        super().generic_visit(node)
        body = getattr(node, 'body', None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            node.body = body[1:] or [ast.Pass()]
        return node

def _names(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return {node.name}
    return {t.id for t in getattr(node, 'targets', []) if isinstance(t, ast.Name)}

def hash_of(source:str, only=None) -> str:
    "A hash of code without comments and docstrings; `only`: names of the definitions that count; None: all."
    nodes = [n for n in _Bare().visit(ast.parse(source)).body if only is None or _names(n) & set(only)]
    nodes = [n for n in nodes if '__all__' not in _names(n)]
    return hashlib.sha256('\n'.join(map(ast.unparse, nodes)).encode()).hexdigest()[:16]

def _hash_of_module(name, only): # a module, or a data file
    path = ROOT/'cmlf'/(name if '.' in name else f'{name}.py')
    text = path.read_text(encoding='utf-8')
    return hash_of(text, only) if path.suffix == '.py' else hashlib.sha256(text.encode()).hexdigest()

def code_hash(name:str) -> str:
    hashes = [_hash_of_module(m, only) for m, only in PARTS[name].items()]
    return hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:16]

def read() -> dict: return json.loads(FILE.read_text(encoding='utf-8'))

def main(names, why):
    sys.path.insert(0, str(ROOT))
    from cmlf.runs import RUN_VERSION
    known = read() if FILE.exists() else {}
    for n in names: known[n] = dict(version=RUN_VERSION[n], hash=code_hash(n), why=why)
    FILE.write_text(json.dumps({n: known[n] for n in sorted(known)}, indent=1) + '\n', encoding='utf-8')

if __name__ == '__main__':
    if len(sys.argv) < 3: sys.exit(__doc__)
    main(sys.argv[1:-1], sys.argv[-1])
