"""``diffalign <verb> [config.yaml] [key.path=value ...]``: parse, validate, hand over, report bad input in one line.

Everything heavy is imported after the config has been validated, by the verb itself.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import shutil
import sys
import textwrap
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffalign import __version__
from diffalign.config import VERBS
from diffalign.config.file import Strict, load
from diffalign.errors import UserError, nearest

DEFAULT_CONFIG = {"quickstart": "quickstart"}
TEXT_CONFIG = {"quickstart": "text/quickstart"}
"""What ``--text`` runs instead: the same verb on the embedded language model."""
METHOD_CONFIG = {"quickstart": {"diffusion-dpo": "quickstart", "awm": "quickstart_awm"}}
"""What ``--method NAME`` runs instead."""
OVERRIDE = re.compile(r"[\w.-]+=")
LISTS = ("methods", "objectives", "shapings", "families", "scorers", "extractors")
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space on the device, over the quota, over a limit on the size of a file."""
DISK_FULL_WORDS = ("no space left", *(f"os error {number}" for number in DISK_FULL), "inline_container.cc")
"""How libraries that do not raise OSError say so: safetensors, and torch in whatever its zip writer makes of it."""


class _Parser(argparse.ArgumentParser):
    """Reports mistakes like every other mistake: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


class Key(NamedTuple):
    """One line of a verb's help."""

    path: str
    kind: str
    default: str
    description: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for bad input, 130 when interrupted."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("diffalign: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough; the flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        line = _explain(error)
        if line is None:
            raise
        return _fail(line)
    return 0


def _fail(message: str) -> int:
    print(f"diffalign: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _explain(error: Exception) -> str | None:
    """One line about a failure of the disk or the operating system; None for anything else, which is a bug."""
    name = getattr(error, "filename", None) or getattr(error, "where", None)
    number = getattr(error, "errno", None)
    if number in DISK_FULL or any(words in str(error).lower() for words in DISK_FULL_WORDS):
        return f"disk full while writing {name or 'a file'}; free space and resume"
    if not isinstance(error, OSError):
        return None
    return f"{name}: {error.strerror.lower()}" if name and error.strerror else str(error) or type(error).__name__


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    if words[0] == "--version":
        print(f"diffalign {__version__}")
        return
    verb, *rest = words
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
    model, target, _ = VERBS[verb]
    if {"-h", "--help"} & set(rest):
        print(_parser(verb).format_help())
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nobody asked for
    if verb == "eval" and len(rest) == 2 and all(map(os.path.isdir, rest)):
        _function("diffalign.evaluate:compare_runs")(*rest)
    elif model is None:
        arguments = vars(_parser(verb).parse_args(rest))
        _function(target)(**arguments)
    else:
        _run_config(verb, model, target, rest)


def _run_config(verb: str, model: type[Strict], target: str, words: Sequence[str]) -> None:
    args = _parser(verb).parse_intermixed_args(_as_overrides(words, verb))
    path, overrides = _split(verb, args.words)
    config = load(model, path, overrides)
    _function(target)(config, dry_run=args.dry_run)


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _as_overrides(words: Sequence[str], verb: str) -> list[str]:
    """Spell ``--key.path value`` and ``--key.path=value`` as ``key.path=value``; ``--resume`` is ``run.resume``."""
    out: list[str] = []
    queue = deque(words)
    while queue:
        word = queue.popleft()
        if word == "--text" and verb in TEXT_CONFIG:
            out.insert(0, TEXT_CONFIG[verb])
            continue
        if word.partition("=")[0] == "--method" and verb in METHOD_CONFIG:
            name = word.partition("=")[2] or (queue.popleft() if queue else "")
            if name not in METHOD_CONFIG[verb]:
                raise UserError(f"--method {name!r}: there is {', '.join(METHOD_CONFIG[verb])}")
            out.insert(0, METHOD_CONFIG[verb][name])
            continue
        if not word.startswith("--") or word in ("--", "--dry-run"):
            out.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if key == "resume":
            if verb != "train":
                raise UserError(f"--resume belongs to `diffalign train`, not to `diffalign {verb}`")
            key = "run.resume"
            if not equals:
                value = queue.popleft() if queue and _is_checkpoint(queue[0]) else "latest"
        elif not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{word} needs a value")
            value = queue.popleft()
        out.append(f"{key}={value}")
    return out


def _is_checkpoint(word: str) -> bool:
    """Whether a word after ``--resume`` is its value rather than a config, an override or an option."""
    return not word.startswith("--") and not OVERRIDE.match(word) and not word.endswith((".yaml", ".yml"))


def _split(verb: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config file, if any, and the overrides among the plain words of a command line."""
    overrides = [word for word in words if OVERRIDE.match(word)]
    files = [word for word in words if word not in overrides]
    if len(files) > 1:
        raise UserError(f"expected one config file, got {' and '.join(map(repr, files))}; overrides are key.path=value")
    if not words and verb not in DEFAULT_CONFIG:
        raise UserError(f"`diffalign {verb}` needs a config file: diffalign {verb} config.yaml [key.path=value ...]")
    return (files[0] if files else DEFAULT_CONFIG.get(verb)), overrides


# --- help ---------------------------------------------------------------------------------------------------------


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, (_, _, text) in VERBS.items())
    return (
        "usage: diffalign <verb> [config.yaml] [key.path=value ...] [options]\n"
        f"       diffalign --version\n\nverbs:\n{verbs}\n\n"
        "`diffalign <verb> --help` shows the keys of its config; `--key.path value` is the same as `key.path=value`."
    )


def _parser(verb: str) -> argparse.ArgumentParser:
    model, _, text = VERBS[verb]
    parser = _Parser(
        prog=f"diffalign {verb}",
        description=text,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if model is not None:
        more = {"train": "[--resume [latest|PATH]]", "quickstart": "[--text] [--method diffusion-dpo|awm]"}.get(
            verb, ""
        )
        if verb == "eval":
            more += f"\n       diffalign {verb} RESULTS_A RESULTS_B: who wins, and whether that is significant"
        parser.usage = f"diffalign {verb} [config.yaml] [key.path=value ...] [--dry-run] {more}"
        parser.epilog = f"config keys:\n{_table(model)}"
        parser.add_argument("words", nargs="*", metavar="config.yaml, key.path=value", help="a config, changes to it")
        parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")
    elif verb == "list":
        parser.add_argument("what", choices=LISTS)
    else:
        parser.add_argument("config_path", nargs="?", metavar="config.yaml", help="a training config to check as well")
    return parser


def _table(model: type[BaseModel]) -> str:
    keys = list(_keys(model))
    path, kind, default = (max(len(key[i]) for key in keys) for i in range(3))
    indent = " " * (path + kind + default + 8)
    width = max(shutil.get_terminal_size((120, 24)).columns, len(indent) + 30)
    return "\n".join(
        textwrap.fill(
            f"  {key.path:<{path}}  {key.kind:<{kind}}  {key.default:<{default}}  {key.description}".rstrip(),
            width,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        for key in keys
    )


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key of a config, sections flattened; ``[]`` and ``<name>`` stand for the entries of lists and mappings."""
    for name, field in model.model_fields.items():
        annotation, path = field.annotation, prefix + name
        if field.description or not _is_section(annotation):
            own = _is_section(annotation) and not field.is_required()  # then its keys say their defaults
            default = "" if own else _default(field)
            yield Key(path, _kind(annotation), default, field.description or "")
        inner: Any = next((a for a in (annotation, *get_args(annotation)) if _is_section(a)), None)
        if inner is not None:
            entries = {list: "[]", dict: ".<name>"}.get(get_origin(annotation), "")  # type: ignore[arg-type]
            yield from _keys(inner, f"{path}{entries}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kind(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is types.UnionType:
        return " or ".join(_kind(a) for a in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"[{', '.join(_kind(a) for a in args)}]"
    if origin is list:
        return f"list of {_kind(args[0])}"
    if origin is dict:
        return "mapping"
    if _is_section(annotation):
        return "section"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else str(value)
