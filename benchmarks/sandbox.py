"""Unit tests in the sandbox on MBPP's reference solutions, and on the same programs made wrong.

    python benchmarks/sandbox.py DATA/train/mbpp.jsonl

Rows are JSON lines with ``response`` (a program) and ``answer`` (its tests). Every reference should
pass. Of every program three wrong ones are made: all returned values replaced by their type's name
(must fail wherever something returned is tested), all numbers one higher, all comparisons negated
(some of these say the same as before, or a test does not tell).
"""

import argparse
import ast
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from tables import report

from tclora.evaluate.sandbox.judge import run_tests


class _Returns(ast.NodeTransformer):
    def visit_Return(self, node: ast.Return) -> ast.Return:
        value = node.value or ast.Constant(None)
        kind = ast.Call(ast.Name("type", ast.Load()), [value], [])
        return ast.Return(ast.Call(ast.Name("repr", ast.Load()), [kind], []))


class _Numbers(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(node.value + 1) if type(node.value) in (int, float) else node


class _Comparisons(ast.NodeTransformer):
    def visit_Compare(self, node: ast.Compare) -> ast.UnaryOp:
        self.generic_visit(node)
        return ast.UnaryOp(ast.Not(), node)


_VARIANTS: dict[str, type[ast.NodeTransformer] | None] = {
    "reference": None,
    "returned values replaced": _Returns,
    "numbers one higher": _Numbers,
    "comparisons negated": _Comparisons,
}


def _changed(code: str, how: type[ast.NodeTransformer] | None) -> str | None:
    """Return a program changed throughout; None where there is nothing to change."""
    if how is None:
        return code
    before = ast.parse(code)
    after = ast.unparse(ast.fix_missing_locations(how().visit(ast.parse(code))))
    return after if after != ast.unparse(before) else None


def _passes(pair: tuple[str, str]) -> bool:
    return run_tests(*pair).passed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    rows = [json.loads(line) for line in lines]
    table = []
    for name, how in _VARIANTS.items():
        changed = [(_changed(row["response"], how), row["answer"]) for row in rows]
        pairs = [(code, tests) for code, tests in changed if code is not None]
        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            passed = sum(pool.map(_passes, pairs))
        seconds = (time.perf_counter() - start) / len(pairs)
        table.append((name, len(pairs), passed, passed / len(pairs), seconds))
    columns = ["programs", "n", "pass", "share", "seconds per program"]
    note = "Two at a time. What survives a change of numbers or comparisons may still be right."
    report("sandbox", "Unit tests in the sandbox: MBPP", pd.DataFrame(table, columns=columns), note)


if __name__ == "__main__":
    main()
