"""The model files of mlx-lm as syntax trees: which are routed-expert types, and how they select.

They are read and not run, so that types which need Metal are seen as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SELECTING = {"argpartition", "topk", "argsort", "argmax"}
Symbol = tuple[str, str]  # (module of mlx_lm.models, name defined at its top level)


@dataclass
class Module:
    """One model file: what it defines at its top level, and what the names that it imports stand for."""

    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # name -> (module, symbol; None: a module)

    @classmethod
    def parse(cls, source: str) -> Module:
        module = cls()
        tree = ast.parse(source)
        for statement in _top_level(tree.body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef):
                module.definitions[statement.name] = statement
            elif isinstance(statement, ast.Assign):
                names = [t.id for t in statement.targets if isinstance(t, ast.Name)]
                module.definitions.update(dict.fromkeys(names, statement))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module._add_import(node)
        return module

    def _add_import(self, node: ast.ImportFrom) -> None:
        package = "mlx_lm.models"
        path = node.module or ""
        if node.level == 0 and (path == package or path.startswith(f"{package}.")):
            path = path.removeprefix(package).removeprefix(".")
        elif node.level != 1:
            return
        for alias in node.names:
            target = (path, alias.name) if path else (alias.name, None)
            self.imports[alias.asname or alias.name] = target


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _top_level([*statement.body, *statement.orelse])


def reached(modules: Mapping[str, Module], model_type: str) -> set[Symbol]:
    """All definitions that the type's class `Model` refers to, directly or through others, in its own file or not."""
    seen: set[Symbol] = set()
    todo: list[Symbol] = [(model_type, "Model")]
    while todo:
        symbol = todo.pop()
        name, definition = symbol
        module = modules.get(name)
        if symbol in seen or module is None:
            continue
        if definition in module.definitions:
            seen.add(symbol)
            todo += _references(module, name, module.definitions[definition])
        elif (target := module.imports.get(definition)) is not None and target[1] is not None:
            todo.append((target[0], target[1]))
    return seen


def _references(module: Module, name: str, node: ast.AST) -> Iterator[Symbol]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            target = module.imports.get(part.id)
            if target is None:
                yield name, part.id
            elif target[1] is not None:
                yield target[0], target[1]
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            target = module.imports.get(part.value.id)
            if target is not None and target[1] is None:
                yield target[0], part.attr


def switches(symbols: set[Symbol]) -> set[str]:
    return {name for module, name in symbols if module == "switch_layers" and "Switch" in name}


def selecting_calls(modules: Mapping[str, Module], symbols: set[Symbol]) -> list[ast.Call]:
    """Calls of mx that select, in definitions that speak of experts or in functions that such definitions name.

    Attention indexers also call argpartition, but in classes of their own that know nothing of experts.
    """
    calls = []
    for name, definition in symbols:
        node = modules[name].definitions[definition]
        if name == "switch_layers" or not any("expert" in word.lower() for word in words_in(node)):
            continue
        callees = [modules[m].definitions[d] for m, d in _references(modules[name], name, node) if (m, d) in symbols]
        for body in [node, *(c for c in callees if isinstance(c, ast.FunctionDef))]:
            calls += [c for c in ast.walk(body) if isinstance(c, ast.Call) and _mx_function(c) in SELECTING]
    return calls


def words_in(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        for attribute in ("id", "attr", "name", "arg"):
            word = getattr(part, attribute, None)
            if isinstance(word, str):
                yield word


def _mx_function(call: ast.Call) -> str | None:
    f = call.func
    return f.attr if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == "mx" else None


def is_routed(modules: Mapping[str, Module], model_type: str) -> bool:
    symbols = reached(modules, model_type)
    return bool(switches(symbols)) or bool(selecting_calls(modules, symbols))


def seam_can_see(modules: Mapping[str, Module], model_type: str) -> bool:
    """Whether some selection is one that the seam redirects: argpartition along the last axis, or sparsemixer."""
    symbols = reached(modules, model_type)
    if any(name == "sparsemixer" for _, name in symbols):
        return True
    return any(
        _mx_function(call) == "argpartition" and _axis(call) in (None, "-1", "axis")
        for call in selecting_calls(modules, symbols)
    )


def _axis(call: ast.Call) -> str | None:
    given = [k.value for k in call.keywords if k.arg == "axis"] + call.args[2:3]
    return ast.unparse(given[0]) if given else None
