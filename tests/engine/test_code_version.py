"""A stage's version follows every definition that the stage uses, and nothing else."""

import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest

import difflt_core
from difflt_core.engine import syntax
from difflt_core.engine.artifacts import Stage, Store
from difflt_core.engine.code_version import NO_RESULT, closure, code_version

PACKAGE = Path(difflt_core.__file__).parent
NUMBERS = count()

STAGES = {
    "__init__.py": "",
    "stages.py": """
        from .deep.middle import step

        def build(work):
            return step(work)

        def other():
            return 1
        """,
    "deep/__init__.py": "",
    "deep/middle.py": """
        from ..low import leaf

        def step(x):
            return leaf(x)

        def unrelated():
            return leaf(2)
        """,
    "low.py": """
        SCALE = 2

        def leaf(x):
            return SCALE * x

        def neighbour():
            return 3
        """,
}


def _dedent(text):
    return re.sub(r"^ {8}", "", text, flags=re.M)


@pytest.fixture
def found(tmp_path):
    """found({file: text}) is what build of a package's stages.py reaches; each call is a new
    package."""

    def found(files, chosen=(), excluded=(), name="build"):
        root = tmp_path / str(next(NUMBERS)) / "pack"
        for path, text in {"__init__.py": "", **files}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(_dedent(text))
        chosen = tuple(dict(chosen).items())
        return closure(root, root / "stages.py", name, chosen, frozenset(excluded))

    return found


def with_edit(path, old, new, files=STAGES):
    assert old in files[path]
    return files | {path: files[path].replace(old, new)}


# What counts


@pytest.mark.parametrize(
    "path, old, new",
    [
        ("stages.py", "step(work)", "step(work + 1)"),
        ("deep/middle.py", "leaf(x)", "leaf(-x)"),
        ("low.py", "SCALE * x", "SCALE + x"),
        ("low.py", "SCALE = 2", "SCALE = 2.0"),
        ("low.py", "SCALE = 2", "SCALE = 2\nprint()"),
        ("low.py", "SCALE = 2", "SCALE = 2\nfor SCALE in (5, 6):\n    pass"),
        ("low.py", "SCALE = 2", "SCALE = 2\nif SCALE:\n    SCALE = 3"),
        ("low.py", "SCALE = 2", "SCALE = 2\nSCALE += 1"),
        ("low.py", "def leaf", "@staticmethod\n        def leaf"),
        ("low.py", "leaf(x)", "leaf(x=1)"),
        ("deep/__init__.py", "", "print()"),  # runs before its modules
    ],
)
def test_an_edit_of_what_is_used_counts(found, path, old, new):
    assert found(with_edit(path, old, new)) != found(STAGES)


@pytest.mark.parametrize(
    "path, old, new",
    [
        ("stages.py", "return 1", "return 2"),
        ("deep/middle.py", "leaf(2)", "leaf(3)"),
        ("low.py", "return 3", "return 4"),
        ("low.py", "def neighbour", "def another"),
        ("low.py", "SCALE = 2", '"""What it is."""\n__all__ = ["leaf"]\nSCALE = 2  # why'),
        ("low.py", "return SCALE", '"""What it does."""\n            return SCALE'),
        ("low.py", "SCALE = 2", "import numpy\n\nSCALE = 2"),
        ("deep/middle.py", "def step", "from .. import stages\n\n        def step"),
        ("low.py", "SCALE = 2", "SCALE = 2\nif __name__ == '__main__':\n    neighbour()"),
    ],
)
def test_an_edit_of_what_is_not_used_does_not(found, path, old, new):
    assert found(with_edit(path, old, new)) == found(STAGES)


USES = {
    "function-local import": """
        def build(work):
            from .low import leaf
            return leaf(work)
        """,
    "attribute of a module": """
        from . import low

        def build(work):
            return low.leaf(work)
        """,
    "alias of a module": """
        import pack.low as lower

        def build(work):
            return lower.leaf(work)
        """,
    "dotted module": """
        import pack.low

        def build(work):
            return pack.low.leaf(work)
        """,
    "decorator": """
        from .low import leaf

        @leaf
        def build(work):
            return work
        """,
    "default": """
        from .low import leaf

        def build(work, how=leaf):
            return how(work)
        """,
    "base class": """
        from .low import Base

        class Derived(Base):
            pass

        def build(work):
            return Derived().run(work)
        """,
    "table of a module": """
        from .low import leaf

        TABLE = {"a": leaf}

        def build(work):
            return TABLE["a"](work)
        """,
    "statement of a module": """
        from .low import leaf

        def build(work):
            return work

        build.also = leaf
        """,
    "import in a branch": """
        try:
            from .low import leaf as it
        except ImportError:
            from .low import neighbour as it

        def build(work):
            return it(work)
        """,
    "import through a package": """
        from .door import leaf

        def build(work):
            return leaf(work)
        """,
    "import through a module": """
        from . import door

        def build(work):
            return door.again.leaf(work)
        """,
    "global": """
        from .low import leaf

        kept = leaf

        def build(work):
            global kept
            kept, before = None, 1
        """,
    "import for what it does": """
        from . import effect

        def build(work):
            return work
        """,
}


@pytest.mark.parametrize("how", USES)
def test_every_way_to_use_a_definition_is_followed(found, how):
    files = {
        "stages.py": USES[how],
        "low.py": STAGES["low.py"] + "\n        class Base:\n            run = leaf\n",
        "door/__init__.py": "from ..low import leaf\nfrom . import again\n",
        "door/again.py": "from pack.low import leaf\n",
        "effect.py": "from .low import leaf\nprint(leaf(1))\n",
    }
    before = found(files)
    assert found(with_edit("low.py", "SCALE * x", "SCALE + x", files)) != before
    assert "pack.low:leaf" in before and "pack.low:SCALE" in before


def test_which_definition_a_name_means_counts(found):
    files = {"low.py": "def a():\n    return 1\n\ndef b():\n    return 2\n"}
    build = "\n\ndef build(work):\n    return x() - y()\n"
    one = found(files | {"stages.py": "from .low import a as x, b as y" + build})
    two = found(files | {"stages.py": "from .low import a as y, b as x" + build})
    assert one != two
    one, two = (
        found({"stages.py": f"import {name} as np\n\ndef build(work):\n    return np.ones(2)\n"})
        for name in ("numpy", "torch")
    )
    assert one != two


def test_circles_end(found):
    files = {
        "stages.py": "from .a import f\n\ndef build(work):\n    return f()\n",
        "a.py": "from . import b\n\ndef f():\n    return b.g()\n",
        "b.py": "from .a import again, f\n\ndef g():\n    return f() + g() + again\n",
    }
    files["a.py"] += "\nfrom .b import again\n"
    assert {"pack.a:f", "pack.b:g"} <= set(found(files))


def test_excluded_modules_are_not_followed(found):
    files = STAGES | {"deep/middle.py": "from ..low import *\n"}
    assert found(files, excluded={"pack.deep.middle"}) == found(
        with_edit("low.py", "SCALE = 2", "SCALE = 3"), excluded={"pack.deep.middle"}
    )


def test_an_excluded_module_must_exist(found):
    with pytest.raises(
        ValueError, match=r"NO_RESULT: expected .* got \['pack.gone'\]; take it out"
    ):
        found(STAGES, excluded={"pack.gone"})


# What cannot be followed is refused


@pytest.mark.parametrize(
    "text, message",
    [
        ("from .gone import f", r"stages.py:1: .*pack.gone"),
        ("from .low import gone as f", r"stages.py:\d+: .*pack.low.*'gone'"),
        ("from pack.low import gone as f", r"stages.py:\d+: .*pack.low.*'gone'"),
        ("from ....far import f", r"stages.py:1: .*above"),
        ("from .low import *\nf = leaf", r"stages.py:1: .*'\*'.*name what"),
        ("from . import low\ndef f():\n    return low.gone()", r"stages.py:3: .*pack.low.*'gone'"),
        ("from . import low\ndef f():\n    return getattr(low, 'x')", "stages.py:3: .*as a value"),
        (
            "import importlib\ndef f():\n    importlib.import_module('x')",
            "stages.py:3: .*importlib",
        ),
        (
            "def f():\n    from importlib import import_module as i\n    i('x')",
            "stages.py:3: .*impo",
        ),
        ("def f():\n    __import__('x')", "stages.py:2: .*__import__"),
        ("def f():\n    return globals()['x']", "stages.py:2: .*globals"),
        ("def f():\n    exec('x')", "stages.py:2: .*exec"),
        ("def f():\n    return eval('x')", "stages.py:2: .*eval"),
        ("import sys\ndef f():\n    return sys.modules['x']", "stages.py:3: .*sys.modules"),
    ],
)
def test_what_cannot_be_followed_is_refused(found, text, message):
    files = STAGES | {"stages.py": f"{text}\n\ndef build(work):\n    return f()\n"}
    with pytest.raises(ValueError, match=message):
        found(files)


def test_asking_whether_a_package_is_there_is_not_refused(found):
    text = "from importlib.util import find_spec\n\ndef build(work):\n    return find_spec('x')\n"
    assert found({"stages.py": text})


def test_a_method_of_such_a_name_is_not_refused(found):
    assert found({"stages.py": "def build(work):\n    return work.eval().exec()\n"})


@pytest.mark.parametrize("stage", [partial(sorted, key=len), len, lambda work: work])
def test_a_stage_must_be_a_function_with_a_name(stage):
    with pytest.raises(ValueError, match="stage: expected a function of a file"):
        code_version(stage)


# Dispatch tables

TABLE = {
    "stages.py": """
        from .table import KINDS

        def build(work):
            return KINDS[work.kind]
        """,
    "table.py": """
        def a():
            return 1

        def b():
            return 2

        KINDS = {"a": a, "b": b}
        """,
}


def test_only_the_chosen_entry_of_a_table_counts(found):
    edited = with_edit("table.py", "return 2", "return 3", TABLE)
    more = with_edit("table.py", '"b": b}', '"b": b, "c": a}', TABLE)
    swapped = with_edit("table.py", '"a": a', '"a": b', TABLE)
    a, b = {"pack.table.KINDS": "a"}, {"pack.table.KINDS": "b"}
    assert found(TABLE, a) == found(edited, a) == found(more, a) != found(swapped, a)
    assert found(TABLE, b) != found(edited, b)
    assert found(TABLE, a) != found(TABLE, b)
    assert found(TABLE) != found(edited) and found(TABLE) != found(more)
    both = {"pack.table.KINDS": ("a", "b")}
    assert found(TABLE, both) == found(more, both) != found(edited, both)


@pytest.mark.parametrize(
    "table, key, message",
    [
        ('{"a": a, "b": b}', "c", r"table.py:\d+: .*expected one of \['a', 'b'\], got 'c'"),
        ("dict(a=a)", "a", r"table.py:\d+: .*expected a dict literal"),
        ('{"a": a, **{}}', "a", r"table.py:\d+: .*expected a dict literal"),
        ('{"a": a}\nKINDS |= {"b": b}', "a", r"table.py:\d+: .*expected a dict literal"),
        ('{"a": a}\nfrom .low import KINDS', "a", r"table.py:\d+: .*expected a dict literal"),
    ],
)
def test_a_table_that_cannot_be_chosen_from_is_refused(found, table, key, message):
    files = TABLE | {"low.py": "KINDS = {}\n"}
    with pytest.raises(ValueError, match=message):
        found(
            with_edit("table.py", '{"a": a, "b": b}', table, files),
            chosen={"pack.table.KINDS": key},
        )


def test_a_chosen_table_that_is_never_met_is_refused(found):
    with pytest.raises(ValueError, match=r"chosen: .*\['pack.tables.KINDS'\].* never met"):
        found(TABLE, chosen={"pack.tables.KINDS": "a"})


# Stages outside the package


def _helper():
    from difflt_core.engine.seeding import derive_seed

    return derive_seed(0)


def build_here(work, config, inputs, context):
    return _helper()


def test_a_stage_outside_the_package_counts_its_own_file_and_the_package():
    path = Path(__file__)
    reached = closure(PACKAGE, path, "build_here")
    here = f"<{path.stem}>"
    assert {
        f"{here}:build_here",
        f"{here}:_helper",
        "difflt_core.engine.seeding:derive_seed",
    } <= set(reached)
    assert code_version(build_here) != code_version(_helper)

    def nested(work):
        return 1

    assert code_version(nested) == code_version(
        test_a_stage_outside_the_package_counts_its_own_file_and_the_package
    )


# The real package


def stages():
    from difflt_core.experiments import pipeline

    names = ("data", "extractor", "diffusion", "samples", "types", "synthetic", "classifier", "sau")
    builds = {name: getattr(pipeline, f"build_{name}") for name in names}
    builds["statistics"] = pipeline.renew_statistics
    return builds | {name: stage.build for name, stage in pipeline.SOURCES.items()}


AID_LOSSES = "difflt_core.generation.losses.AID_LOSSES"
BACKBONES = "difflt_core.recognition.networks.BACKBONES"
OBJECTIVES = "difflt_core.recognition.methods.OBJECTIVES"
CHOOSING = {"extractor", "classifier"}  # the stages that train by a chosen method


def real(root, stage, method=None, more=None):
    """What a stage reaches in a copy of the package. more: entries chosen of other tables."""
    function = stages()[stage]
    path = root / Path(function.__code__.co_filename).relative_to(PACKAGE)
    chosen = ({OBJECTIVES: method} if method else {}) | (more or {})
    return closure(root, path, function.__name__, tuple(sorted(chosen.items())))


@pytest.fixture
def edited(tmp_path):
    """edited(name): a copy of the package in which the functions of that name are another."""

    def edited(name):
        root = tmp_path / str(next(NUMBERS)) / "difflt_core"
        shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
        start, n = re.compile(rf"^(def {name}\(.*?\n)(    \"\"\")", re.M | re.S), 0
        for path in root.rglob("*.py"):
            text, k = start.subn(r"\1    edited = 1\n\2", path.read_text(encoding="utf-8"))
            path.write_text(text, encoding="utf-8")
            n += k
        assert n == 1, f"{name}: {n} definitions"
        return root

    return edited


def test_an_edit_changes_no_code_that_was_imported(tmp_path, monkeypatch):
    path = tmp_path / "module.py"
    path.write_text("def old(): pass\n")
    monkeypatch.setitem(syntax._AT_IMPORT, path, path.read_text())
    path.write_text("def new(): pass\n")
    assert syntax.Module("module", path, "").bound.keys() == {"old"}
    here = Path(syntax.__file__).resolve()
    assert syntax._AT_IMPORT[here] == here.read_text(encoding="utf-8")


def test_the_version_of_every_stage():
    for cached in (closure, syntax.read_module, syntax.find_file, syntax.uses, syntax.meaning):
        cached.cache_clear()
    versions = {}
    for name, build in stages().items():
        chosen = {OBJECTIVES: "ce"} if name in CHOOSING else {}
        versions[name] = code_version(build, chosen=chosen)
    assert len(set(versions.values())) == len(versions)
    assert syntax.read_module.cache_info().misses <= len(list(PACKAGE.rglob("*.py")))


def test_a_policy_is_no_part_of_a_training_without_it(edited):
    policies, root = "difflt_core.data.augment.POLICIES", edited("randaugment")

    def version(where, *names):
        return real(where, "extractor", "ce", {policies: names})

    assert version(PACKAGE, "none") == version(root, "none")
    assert version(PACKAGE, "none", "randaugment") != version(root, "none", "randaugment")


@pytest.mark.parametrize(
    "stage", ["data", "diffusion", "samples", "types", "synthetic", "sau", "statistics"]
)
def test_only_the_training_of_classifiers_depends_on_the_methods(stage):
    assert f"{OBJECTIVES.replace('.OBJ', ':OBJ')}" not in real(PACKAGE, stage)


def test_an_edit_of_rides_loss_discards_only_ride(edited):
    root = edited("ride_loss")
    for stage in ("diffusion", "samples", "types", "sau"):
        assert real(root, stage) == real(PACKAGE, stage)
    changed = {m for m in _methods() if real(root, "extractor", m) != real(PACKAGE, "extractor", m)}
    assert changed == {"ride"}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("balanced_softmax_loss", {"bsce"}),
        ("class_balanced_weights", {"cb", "ldam", "ride"}),
        ("ldam_margins", {"ldam", "ride"}),
        ("gpaco_loss", {"gpaco"}),
        ("weighted_mean", {"ce", "cb", "bsce", "ldam", "paco", "gpaco", "ride"}),
    ],
)
def test_an_edit_of_a_loss_discards_the_methods_that_use_it(edited, name, expected):
    root = edited(name)
    for stage in CHOOSING:
        changed = {m for m in _methods() if real(root, stage, m) != real(PACKAGE, stage, m)}
        assert changed == expected


def _methods():
    from difflt_core.recognition.methods import OBJECTIVES

    return list(OBJECTIVES)


def test_the_key_of_a_stage_follows_the_chosen_entry(tmp_path):
    build, store = stages()["extractor"], Store(tmp_path)
    keys = {m: Stage("extractor", build, chosen={OBJECTIVES: m}) for m in ("ce", "ride")}
    keys = {m: store.plan(stage, {}, {}).key for m, stage in keys.items()}
    assert keys["ce"] != keys["ride"] and Stage("a", build).chosen == {}
    assert store.plan(Stage("extractor", build), {}, {}).key not in keys.values()


def test_an_edit_of_the_aid_loss_discards_generators_with_it_alone(edited):
    root = edited("aid_loss")

    def version(where, *formula):
        return real(where, "diffusion", more={AID_LOSSES: formula})

    assert version(PACKAGE, "hinge") != version(root, "hinge")
    assert version(PACKAGE) == version(root)
    assert version(PACKAGE, "squared") == version(root, "squared")
    for stage, method in (("data", None), ("extractor", "ce"), ("types", None), ("sau", None)):
        assert real(root, stage, method) == real(PACKAGE, stage, method)


def test_another_network_retrains_nothing(tmp_path):
    """Nor a change of one what another was trained with."""
    root = tmp_path / "difflt_core"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    path = root / "recognition" / "networks.py"
    text = path.read_text(encoding="utf-8").replace(
        '    "resnet50": ', '    "mine": lambda *a: SmallCNN(*a),\n    "resnet50": '
    )
    path.write_text(text.replace("nn.MaxPool2d(2)", "nn.AvgPool2d(2)"), encoding="utf-8")
    changed = set()
    for stage in ("extractor", "types", "sau", "diffusion"):
        for arch in ("small_cnn", "resnet32", "resnet50"):
            method = "ce" if stage in CHOOSING else None
            old, new = (real(where, stage, method, {BACKBONES: arch}) for where in (PACKAGE, root))
            changed |= {arch} if old != new else set()
    assert changed == {"small_cnn"}


def test_reading_a_classifier_does_not_depend_on_its_training(edited):
    root = edited("build_classifier")
    assert real(root, "types") == real(PACKAGE, "types")
    assert real(root, "classifier", "ce") != real(PACKAGE, "classifier", "ce")


def test_every_excluded_module_exists():
    for name in NO_RESULT:
        assert PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py").is_file(), name


def test_every_entry_of_a_table_is_a_value_of_the_configuration():
    from typing import get_args

    from difflt_core.config import ClassifierConfig, DiffusionConfig
    from difflt_core.generation.losses import AID_LOSSES
    from difflt_core.recognition.networks import BACKBONES

    def values(config, name):
        return set(get_args(config.model_fields[name].annotation))

    assert set(_methods()) == values(ClassifierConfig, "method")
    assert set(BACKBONES) == values(ClassifierConfig, "arch")
    assert set(AID_LOSSES) == values(DiffusionConfig, "aid_formula")


def test_the_versions_are_the_same_in_another_process():
    run = (
        "import sys; sys.path.insert(0, sys.argv[1]); from difflt_core.engine.code_version import "
    )
    run += "code_version; from difflt_core.engine.seeding import derive_seed as f; print(code_version(f))"
    command = [sys.executable, "-c", run, str(PACKAGE.parent)]
    from difflt_core.engine.seeding import derive_seed

    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == code_version(derive_seed)
