"""The code that results depend on, as hashes that are pinned in pinned.json.

    python tests/pinned.py ROOM "a sentence: why results change, or why they stay the same"
"""
import ast, hashlib, json, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).with_name('pinned.json')

PARTS = {   # a part of a module by the names of its definitions; other rooms are whole modules
    'batches': ('mining', 'mine mine_random Task unit_vectors _search _labels _keep_apart spread_groups _weights separate _separate _together choose_dropped KINDS'.split()),
    'reproduce': ('reproduce', 'fit new_model trained vectors pretrain fit_experts fit_ce _features_on_disk store pairs key _key contents '
                               'parents relevant run_profile corpus log_mel Lab'.split())}

class _Bare(ast.NodeTransformer):
    "Without docstrings; comments are no part of a tree."
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
    "A hash of code, comments and docstrings aside; `only` definitions of these names, or all."
    nodes = [n for n in _Bare().visit(ast.parse(source)).body if only is None or _names(n) & set(only)]
    nodes = [n for n in nodes if '__all__' not in _names(n)]
    return hashlib.sha256('\n'.join(map(ast.unparse, nodes)).encode()).hexdigest()[:16]

def code_hash(room:str) -> str:
    module, only = PARTS.get(room, (room, None))
    return hash_of((ROOT/'cmlf'/f'{module}.py').read_text(encoding='utf-8'), only)

def read() -> dict: return json.loads(FILE.read_text(encoding='utf-8'))

def main(rooms, why):
    sys.path.insert(0, str(ROOT))
    from cmlf.reproduce import RUN_VERSION
    known = read() if FILE.exists() else {}
    for room in rooms: known[room] = dict(version=RUN_VERSION[room], hash=code_hash(room), why=why)
    FILE.write_text(json.dumps({r: known[r] for r in sorted(known)}, indent=1) + '\n', encoding='utf-8')

if __name__ == '__main__':
    if len(sys.argv) < 3: sys.exit(__doc__)
    main(sys.argv[1:-1], sys.argv[-1])
