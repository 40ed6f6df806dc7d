"""What users can name is pinned: verbs, public names, packages, and every config that ships."""

import ast
import importlib
import shlex
import tomllib

import pytest

import diffalign
from diffalign import config
from diffalign.config import file as configfile


def test_verbs_are_pinned():
    assert list(config.VERBS) == [
        "quickstart",
        "import",
        "generate",
        "score",
        "build",
        "label",
        "train",
        "export",
        "eval",
        "arena",
        "serve",
        "report",
        "list",
        "doctor",
    ]


@pytest.mark.parametrize("verb", config.VERBS)
def test_every_verb_has_its_function(verb, modules):
    module, _, function = config.VERBS[verb][1].partition(":")
    assert module in modules
    assert function in {node.name for node in modules[module].body if isinstance(node, ast.FunctionDef)}


def test_public_names_are_exact():
    assert set(diffalign.__all__) == {
        "METHODS",
        "OBJECTIVES",
        "Batch",
        "Record",
        "load_family",
        "load_scorer",
        "loss_step",
    }


@pytest.mark.parametrize("name", diffalign.__all__)
def test_public_names_resolve(name):
    assert getattr(diffalign, name) is not None
    assert name in dir(diffalign)


def test_registries_are_full_at_the_front_door():
    assert "diffusion-dpo" in diffalign.METHODS
    assert "sigmoid" in diffalign.OBJECTIVES


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(diffalign, "no_such_name")  # noqa: B009


def test_every_all_names_what_exists(modules):
    for name, tree in modules.items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                module = importlib.import_module(name)
                missing = [public for public in module.__all__ if not hasattr(module, public)]
                assert not missing, f"{name}.__all__ names {missing}"


def test_packages_are_the_folders_on_disk(root):
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    moved = {folder: package for package, folder in settings["package-dir"].items()}
    folders = {path.parent.relative_to(root) for top in ("diffalign", *moved) for path in (root / top).rglob("*.py")}
    packages = {moved.get(str(folder), ".".join(folder.parts)) for folder in folders}
    assert packages | {"diffalign.configs"} == set(settings["packages"])


def test_configs_ship():
    assert list(configfile.config_root().rglob("*.yaml")), "no shipped configs"


SHIPPED = sorted(configfile.config_root().rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(configfile.config_root())))
def test_shipped_config_is_valid_for_the_verb_in_its_header(path):
    header = path.read_text(encoding="utf-8").partition("\n")[0]
    assert header.startswith("# diffalign "), f"{path}: the first line must be `# diffalign <verb> ...`"
    verb, *words = shlex.split(header.removeprefix("# diffalign "))
    assert verb in config.VERBS
    model = config.VERBS[verb][0]
    assert model is not None, f"`diffalign {verb}` takes no config"
    configfile.load(model, path)
    for word in words[:1]:
        if word.endswith(".yaml"):
            assert (configfile.config_root().parent / word).resolve() == path.resolve(), f"{path}: header names {word}"


def test_yaml_has_one_spelling():
    assert not list(configfile.config_root().rglob("*.yml")), "configs end in .yaml: only those are tested"
