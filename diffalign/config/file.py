"""YAML -> typed config: one level of ``extends``, ``key.path=value`` overrides, strict validation. Torch-free.

Unknown keys name the nearest valid ones; values are typed by the schema, not guessed.
"""

from __future__ import annotations

import importlib.util
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from diffalign.errors import UserError, nearest

Json = Any


class ConfigError(UserError):
    """A configuration that cannot be used."""


class Strict(BaseModel):
    """Base of every config: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=Strict)


def config_root() -> Path:
    """The folder of shipped YAMLs: inside the installed package, else beside it in a checkout."""
    spec = importlib.util.find_spec("diffalign")
    package = Path(next(iter(spec.submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find(name: str) -> Path:
    """A config by path, else by its name below :func:`config_root` (`quickstart` or `shapes/train.yaml`)."""
    for candidate in (Path(name), config_root() / name, config_root() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = [str(p.relative_to(config_root())) for p in sorted(config_root().rglob("*.yaml"))]
    raise ConfigError(f"no config file {name!r}{nearest(name, shipped)}")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as YAML 1.2 does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Json]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(content).__name__}")
    return content


def _merge(base: Mapping[str, Json], top: Mapping[str, Json]) -> dict[str, Json]:
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merge(out[key], value) if both else value
    return out


def _apply_override(model: type[BaseModel], content: dict[str, Json], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key.path=value")
    *parents, last = key.split(".")
    plain = text != "null" and _is_text(model, parents, last)
    try:
        value = text if plain else yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    for part in parents:
        if content.get(part) is None:  # absent, or switched off with null
            content[part] = {}
        content = content[part]
        if not isinstance(content, dict):
            raise ConfigError(f"override {override!r}: {part!r} is not a section")
    content[last] = value


def _is_text(model: type[BaseModel], parents: Sequence[str], last: str) -> bool:
    """Whether a key holds text, so that its value on the command line is taken as it is (`run.dir=2026`)."""
    for part in parents:
        field = model.model_fields.get(part)
        inner = next(_models(field.annotation), None) if field else None
        if field is not None and inner is None:
            return False
        model = inner or model
    field = model.model_fields.get(last)
    return field is not None and field.annotation in (str, str | None)


def _fields(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The valid keys at a location of a config model, for suggestions."""
    for part in location:
        field = model.model_fields.get(str(part))
        inner = next(_models(field.annotation), None) if field else None
        if inner is None and field is not None:
            return []
        model = inner or model
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _short(value: Any) -> str:
    """A value for a message. Aliases make a few lines of YAML a value that would take gigabytes to print."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 2, 100, 100
    return brief.repr(value)


def _explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}{nearest(str(item['loc'][-1]), _fields(model, item['loc'][:-1]))}")
        elif item["type"] == "missing":
            lines.append(f"missing key {where!r}")
        else:
            lines.append(f"{where}: {item['msg'].lower()} (got {_short(item['input'])})")
    return f"{source}: {'; '.join(lines)}"


def validate(model: type[C], content: Mapping[str, Json], source: str = "config") -> C:
    """A mapping as a typed config.

    Raises:
        ConfigError: one line that names every wrong key and the nearest valid ones.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, source)) from None


def load(model: type[C], name: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read, extend, override and validate one config file; without one the overrides are the config.

    Raises:
        ConfigError: the file, a key or a value cannot be used.
    """
    path = None if name is None else find(str(name))
    content = {} if path is None else _read_extended(path)
    for override in overrides:
        _apply_override(model, content, override)
    return validate(model, content, "command line" if path is None else str(path))


def _read_extended(path: Path) -> dict[str, Json]:
    content = _read_yaml(path)
    parent = content.pop("extends", None)
    if parent is None:
        return content
    found = next(
        (folder / str(parent) for folder in (path.parent, config_root()) if (folder / str(parent)).is_file()), None
    )
    if found is None:
        raise ConfigError(f"{path}: extends {parent}, which is neither beside it nor a shipped config")
    base = _read_yaml(found)
    if "extends" in base:
        raise ConfigError(f"{path}: extends {parent}, which itself extends another file; one level only")
    return _merge(base, content)


def dump(config: Strict) -> str:
    """The config as YAML that loads to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
