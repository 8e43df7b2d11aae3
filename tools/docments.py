"A griffe extension: comments beside arguments, results and fields become their documentation; patched methods go to their class."
import ast, io, tokenize
from functools import cache

import griffe


@cache
def comments(path) -> dict[int, str]:
    "The comment that ends each line of a file."
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}

def argument_comments(node, notes) -> dict[str, str]:
    "A comment belongs to the last argument on its line."
    args = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    last = {a.end_lineno: a.arg for a in args if a is not None}
    result = node.returns.end_lineno if node.returns else None
    found = {name: notes[line] for line, name in last.items() if line in notes and line != result}
    return found | ({'return': notes[result]} if result in notes else {})

def section(title, lines) -> str: return f'\n\n{title}:\n' + '\n'.join(f'    {l}' for l in lines) if lines else ''

QUIET = {'warn_missing_types': False, 'warn_unknown_params': False, 'returns_named_value': False}

class Docments(griffe.Extension):
    def __init__(self): self.patched = []

    def on_function_instance(self, *, node, func, agent, **kwargs):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef): return
        notes = argument_comments(node, comments(func.filepath))
        result = [notes.pop('return')] if 'return' in notes else []
        text = func.docstring.value if func.docstring else ''
        text += section('Args', [f'{k}: {v}' for k, v in notes.items()]) + section('Returns', result)
        if text: func.docstring = griffe.Docstring(text.strip('\n'), parent=func, parser='google', parser_options=QUIET)
        decorators = [getattr(d, 'id', getattr(getattr(d, 'func', None), 'id', '')) for d in node.decorator_list]
        if 'patch' in decorators and node.args.args: self.patched.append((func.module.path, func, node.args.args[0].annotation))

    def on_attribute_instance(self, *, node, attr, agent, **kwargs):
        if attr.docstring is None and getattr(node, 'end_lineno', None) in comments(attr.filepath):
            attr.docstring = griffe.Docstring(comments(attr.filepath)[node.end_lineno], parent=attr)

    def on_module_members(self, *, mod, **kwargs):
        "Methods that `@patch` adds are members of their class."
        mine = [(f, a) for path, f, a in self.patched if path == mod.path]
        for func, annotation in mine:
            owner = mod.members.get(getattr(annotation, 'id', ''))
            if owner is None or not owner.is_class: continue
            if mod.members.get(func.name) is func: mod.del_member(func.name)
            owner.set_member(func.name, func)
