"""Closures of source, on a package made here and on our own stages while they run."""

import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.closure import closure, find_source, symbols_of
from tasks.definitions import Symbol, parse
from tclora.merge import merge
from tclora.registry import Registry

SOURCES = {
    "__init__": "from made.helper import f as exported",
    "use": """
        import made.deep
        from made import leaf
        from made.helper import f
        from made.variants import VARIANTS

        LIMIT = 3

        def run(x):
            '''Run it.'''
            from made.late import late
            return f(x) + made.deep.g(x) + leaf.value + late() + LIMIT

        def pick(name):
            return VARIANTS[name]()

        def judge(row):
            from made.variants import RULES
            return RULES[row]()

        def through_package():
            import made
            return made.exported(1)

        def unused():
            return other()

        def other():
            return 1
    """,
    "helper": """
        def f(x):
            return _inner(x)

        def _inner(x):
            return x

        def idle():
            return 0
    """,
    "deep": """
        class Base:
            pass

        class Deep(Base):
            n = 1

        def g(x):
            return Deep.n * x
    """,
    "classes": """
        from dataclasses import dataclass
        from functools import lru_cache
        from typing import NamedTuple

        @dataclass
        class Place:
            root: str

            def __post_init__(self):
                self.done = 1

            @property
            def here(self):
                return self.root + self._tail()

            def _tail(self):
                return "tail"

            @lru_cache
            def kept(self):
                return "kept"

            def idle(self):
                return "idle"

        class Handler(Place):
            def emit(self):
                return "emitted"

        def where(x):
            return Place(x).here

        def handle(x):
            return Handler(x)

        def named(x):
            return getattr(Place(x), "idle")()
    """,
    "leaf": "value = 1\nelsewhere = 2",
    "late": "def late():\n    return 1",
    "variants": """
        from tclora.registry import Registry

        VARIANTS = Registry("variant")
        RULES = Registry("rule", named_by_rows=True)

        @RULES.register("strict")
        def strict():
            return 3

        @VARIANTS.register("one")
        def one():
            return 1

        @VARIANTS.register("two")
        def two():
            return 2
    """,
}  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "made"
    root.mkdir()
    for name, source in SOURCES.items():
        (root / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    find_source.cache_clear()
    yield root
    find_source.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "made"]:
        del sys.modules[name]


def names(found):
    return {f"{s.module.removeprefix('made.')}.{s.name}" for s in found.definitions
            if s.module.startswith("made")}  # fmt: skip


def test_names_are_followed_through_imports_attributes_and_late_imports(package):
    from made.use import run

    assert names(closure([run])) == {
        "use.run", "use.LIMIT", "helper.f", "helper._inner", "deep.g", "deep.Deep", "deep.Base",
        "leaf.value", "late.late",
    }  # fmt: skip


def test_what_a_package_exports_is_followed_home(package):
    from made.use import through_package

    assert names(closure([through_package])) == {"use.through_package", "helper.f", "helper._inner"}


def test_of_a_registry_that_the_data_name_from_every_variant_counts(package):
    from made.use import judge

    assert "variants.strict" in names(closure([judge]))


def test_of_a_registry_the_variants_that_are_named_count(package):
    from made.use import pick

    assert "variants.two" in names(closure([pick], ["two"]))
    assert "variants.one" not in names(closure([pick], ["two"]))


@pytest.mark.parametrize(
    ("module", "old", "new", "counts"),
    [
        ("helper", "return x\n", "return x + 0\n", True),
        ("use", "LIMIT = 3", "LIMIT = 4", True),
        ("deep", "class Base:\n    pass", "class Base:\n    m = 2", True),
        ("late", "return 1", "return 2", True),
        ("leaf", "value = 1", "value = 1  # a comment", False),
        ("leaf", "elsewhere = 2", "elsewhere = 3", False),
        ("use", "Run it.", "Do it.", False),
        ("use", "return 1", "return 2", False),
        ("helper", "return 0", "return 1", False),
        ("variants", "return 2", "return 3", False),
    ],
)
def test_a_change_counts_where_the_function_can_execute_it(package, module, old, new, counts):
    from made.use import run

    before = closure([run]).digest
    file = package / f"{module}.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert (closure([run]).digest != before) is counts


def test_methods_count_where_their_names_are_used(package):
    from made.classes import where

    found = names(closure([where]))
    assert found == {
        "classes.where", "classes.Place", "classes.Place.here", "classes.Place._tail"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("function", "old", "new", "counts"),
    [
        ("where", "self.done = 1", "self.done = 2", True),  # special
        ("where", "return self.root", "return 'x' + self.root", True),
        ("where", 'return "tail"', 'return "head"', True),
        ("where", 'return "kept"', 'return "lost"', True),  # a decorator may do anything with it
        ("where", 'return "idle"', 'return "busy"', False),
        ("where", 'return "emitted"', 'return "kept"', False),
        ("handle", 'return "emitted"', 'return "kept"', True),  # its base class may call it
        ("named", 'return "idle"', 'return "busy"', True),
    ],
)
def test_a_changed_method_counts_where_it_can_be_called(package, function, old, new, counts):
    import made.classes

    root = getattr(made.classes, function)
    before = closure([root]).digest
    file = package / "classes.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert (closure([root]).digest != before) is counts


def test_closures_are_found_in_threads_at_once():
    """Parallel stages ask for their keys at the same time, before anything was parsed."""
    parse.cache_clear()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: closure([merge], ["uniform"]).digest, range(64)))
    assert len(set(found)) == 1


def test_symbols_of_what_registries_hold():
    from functools import partial

    assert list(symbols_of(closure)) == [Symbol("tasks.closure", "closure")]
    assert list(symbols_of(partial(closure, []))) == [Symbol("tasks.closure", "closure")]
    assert list(symbols_of(Registry("x"))) == [Symbol("tclora.registry", "Registry")]
    assert list(symbols_of(3)) == []
