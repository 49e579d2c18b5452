"""Experiment files, options and stores that somebody else has written: read right, or refused in
one sentence that names the file, the field, what was found and what to do.

Each row is an input, the exit code, and what the message must name. A new case is one line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from raytvb.cli.main import cli, main
from raytvb.cli.options import NotBlank
from raytvb.experiment import yaml_text
from raytvb.experiment.parsing import load_experiment, parse_experiment
from raytvb.experiment.yaml_text import parse_yaml
from raytvb.storage import filesystems
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError

HEAD = "store: STORE\ntasks: [glyphs/greek-blur]\n"
OWN = "store: STORE\ntasks:\n- name: own\n  data: /data\n"
LIBRARY = (
    "Traceback", "[type=", "Input should", "valid dictionary", "instance of", "[Errno", "Errno",
    "validation error", "pydantic", "errors.pydantic.dev", "Value error", "NoneType", "Config",
    "<class", "KeyError", "TypeError", "AttributeError", "TaskConfig",
)  # fmt: skip
"""Words of libraries and of Python, which no message may have."""

LONGEST_S = 20.0


def bomb(merge: str = "") -> str:
    """A kilobyte whose aliases stand for 10^18 values."""
    levels = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    for level in range(1, 18):
        levels.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    if merge:
        levels = ["a0: &a0 {k: 0}"]
        for level in range(1, 18):
            levels.append(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}")
    return "\n".join(levels)


def tasks(*names: str) -> str:
    listed = "".join(f"- {{name: {name}, data: /data}}\n" for name in names)
    return f"store: STORE\ntasks:\n{listed}"


# What is wrong in a file: its text (or bytes), and what the message must name.
FILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    # YAML
    "nothing": ("", ("expected fields like `store:`", "found nothing")),
    "a comment": ("# nothing\n", ("found nothing",)),
    "a list": ("- a\n", ("expected fields", "['a']")),
    "text": ("hello\n", ("expected fields", "'hello'")),
    "a number": ("5\n", ("expected fields", "found 5")),
    "aliases that multiply": (bomb(), ("line 6", "aliases multiply", "1,000,000 values")),
    "merge keys that multiply": (bomb("merge"), ("aliases multiply", "1,000,000 values")),
    "aliases in the tasks": (
        "store: s\ntasks: &t [*t]\n",
        ("line 2", "contains itself"),
    ),
    "aliases that nest": (
        "a0: &a0 [0]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000)),
        ("line 101", "deeper than 100"),
    ),
    "an alias of nothing": (HEAD + "seed: *nothing\n", ("line 3", "'*nothing'", "quotes")),
    "deep lists": (HEAD + "search: " + "[" * 5000 + "\n", ("line 3", "deeper than 100")),
    "deep fields": (HEAD + "search: " + "{a: " * 5000 + "\n", ("line 3", "deeper than 100")),
    "deep blocks": (
        HEAD + "\n".join(f"{' ' * depth}a:" for depth in range(300)) + "\n",
        ("deeper than 100",),
    ),
    "17 MB": (HEAD + "#" * 17 * 2**20, ("larger than 16 MB",)),
    "a key twice": (HEAD + "seed: 1\nseed: 2\n", ("line 4", "'seed'", "second time", "line 3")),
    "a section twice": (HEAD + "talos: {rounds: 1}\ntalos: {}\n", ("'talos'", "line 3")),
    "an inner key twice": (HEAD + "talos: {rounds: 1,\n rounds: 2}\n", ("line 4", "'rounds'")),
    "a key of a task twice": (OWN + "  data: /other\n", ("line 5", "'data'", "line 4")),
    "a key in quotes again": (HEAD + "seed: 1\n'seed': 2\n", ("'seed'", "second time")),
    "a merge key twice": (
        HEAD + "model: {<<: {name: a}, <<: {name: b}}\n",
        ("'<<'", "second time"),
    ),
    "merging of no fields": (HEAD + "model: {<<: 5}\n", ("line 3", "`<<`", "*common")),
    "a key that is a number": (HEAD + "1: 2\n", ("line 3", "'1'", "a number", "quotes")),
    "a key that is true": (HEAD + "on: 2\n", ("line 3", "'on'", "true or false", "quotes")),
    "a key that is null": (HEAD + "~: 2\n", ("line 3", "'~'", "quotes")),
    "a key that is a list": (HEAD + "? [a]\n: 2\n", ("line 3", "name of a field")),
    "two documents": (HEAD + "---\n" + HEAD, ("line 3", "second document")),
    "a document that ends": (HEAD + "...\n---\nseed: 1\n", ("second document",)),
    "a tab": (HEAD + "talos:\n\trounds: 1\n", ("line 4", "tab", "spaces")),
    "a tab in a task": ("store: s\ntasks:\n- name: a\n\tdata: /d\n", ("line 4", "tab")),
    "an open bracket": (HEAD + "search: {sizes: [1, 2}\n", ("line 3", "brackets")),
    "an open quote": (HEAD + "name: 'abc\n", ("quotes",)),
    "bad indentation": (HEAD + "talos:\n   rounds: 1\n  draws: 1\n", ("line 5", "indentation")),
    "a colon in text": (HEAD + "name: a: b\n", ("line 3", "quotes")),
    "a prompt without quotes": (OWN + "  templates: [a photo of a {}.]\n", ("line 5", "quotes")),
    "UTF-16": (HEAD.encode("utf-16"), ("UTF-16", "save it as UTF-8")),
    "Latin-1": (HEAD.encode() + b"name: caf\xe9\n", ("line 3", "0xe9", "UTF-8")),
    "a zero byte": (HEAD + "name: a\0b\n", ("line 3", "U+0000", "remove it")),
    "a control character": (HEAD + "name: a\x07b\n", ("line 3", "control character U+0007")),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(99), ("line 1", "UTF-8")),
    "a tag of Python": (HEAD + "name: !!python/name:os.system\n", ("line 3", "tag", "python/name")),
    "a tag": (HEAD + "name: !env HOME\n", ("line 3", "!env", "quotes")),
    "a set": (HEAD + "search: {sizes: !!set {1, 2}}\n", ("line 3", "tag", "set")),
    "bytes": (HEAD + "name: !!binary aGk=\n", ("line 3", "tag", "binary")),
    "an equals sign": (OWN + "  classes: [+, =]\n", ("line 5", "'='", "quotes")),
    "a bool that is none": (HEAD + "name: !!bool maybe\n", ("line 3", "'maybe'", "quotes")),
    "an int that is none": (HEAD + "seed: !!int ''\n", ("line 3", "''", "of the type int")),
    "digits that are none": (HEAD + "seed: 0x_\n", ("line 3", "'0x_'", "of the type int")),
    "a map that is none": (HEAD + "seed: !!map 5\n", ("line 3", "the tag 'map'")),
    "an int that is a list": (HEAD + "seed: !!int [5]\n", ("line 3", "the tag 'int'")),
    "a merge key as a value": (HEAD + "name: <<\n", ("line 3", "'<<'", "quotes")),
    "a date": (OWN.replace("own", "2020-01-01"), ("line 3", "2020-01-01", "a date", "quotes")),
    "base 60": (OWN + "  classes: [12:30, 13:30]\n", ("line 5", "12:30", "base 60", "quotes")),
    "base 8": (HEAD + "seed: 010\n", ("line 3", "010", "base 8")),
    "base 8 in names": (OWN + "  classes: [001, 002]\n", ("line 5", "001", "base 8", "quotes")),
    "5,000 digits": (HEAD + f"seed: {'9' * 5000}\n", ("line 3", "5,000 characters")),
    "half a directive": ("%YAML 3.0\n---\n" + HEAD, ("line 1",)),
    "a merge conflict": (HEAD + "<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n", ("line 4",)),
    "a quote that is missing": ('{"store": "s" "tasks": 1}', ("line 1", "',' or '}'", "quotes")),
    # Types: a bool is no number, a number no text, and text is none of them.
    "seed: true": (HEAD + "seed: true\n", ("seed: found true", "a whole number")),
    "seed: text": (HEAD + "seed: '7'\n", ("seed: found '7'", "write 7 without quotes")),
    "seed: 1.5": (HEAD + "seed: 1.5\n", ("seed: found 1.5", "a whole number")),
    "seed: null": (HEAD + "seed:\n", ("seed: found null", "a whole number")),
    "seed: list": (HEAD + "seed: [1]\n", ("seed: found [1]", "a whole number")),
    "seed: look-alikes": (HEAD + "seed: １２\n", ("seed: found '１２'", "a whole number")),
    "seed: 0o17": (HEAD + "seed: 0o17\n", ("seed: found '0o17'", "a whole number")),
    "epochs: nan": (HEAD + "finetune: {epochs: nan}\n", ("found 'nan'", "a number above 0")),
    "epochs: 1e9999": (HEAD + "finetune: {epochs: 1e9999}\n", ("epochs: found inf",)),
    "epochs: 5e9": (HEAD + "finetune: {epochs: 5e9}\n", ("epochs: found 5000000000.0",)),
    "epochs: 10 %": (HEAD + "finetune: {epochs: 10%}\n", ("found '10%'", "a number above 0")),
    "memory: 4GB": (HEAD + "resources: {memory_gb_per_task: 4GB}\n", ("1,000,000, or null",)),
    "300 digits": (HEAD + f"seed: {'9' * 300}\n", ("seed: found a number of about 300 digits",)),
    "epochs: text": (HEAD + "finetune: {epochs: '3'}\n", ("finetune.epochs", "without quotes")),
    "epochs: true": (HEAD + "finetune: {epochs: yes}\n", ("found true (written yes)",)),
    "epochs: .inf": (HEAD + "finetune: {epochs: .inf}\n", ("finetune.epochs: found inf",)),
    "epochs: .nan": (HEAD + "finetune: {epochs: .nan}\n", ("finetune.epochs: found nan",)),
    "epochs: 1e400": (HEAD + "finetune: {epochs: 1e400}\n", ("finetune.epochs", "100,000")),
    "epochs: 300 digits": (HEAD + f"finetune: {{epochs: {'9' * 350}}}\n", ("finetune.epochs",)),
    "negation: text": (HEAD + "evaluate: {negation: 'false'}\n", ("true or false", "quotes")),
    "negation: 0": (HEAD + "evaluate: {negation: 0}\n", ("evaluate.negation: found 0", "true or")),
    "online: one": (HEAD + "basis: {online: 1}\n", ("basis.online: found 1", "true or false")),
    "name: no": (HEAD + "name: no\n", ("name: found false (written no)", "quotes: 'no'")),
    "name: 5": (HEAD + "name: 5\n", ("name: found 5", "quotes: '5'")),
    "a task called no": (OWN.replace("own", "no"), ("tasks[0].name", "'no'", "quotes")),
    "a task called 1": ("store: s\ntasks: [1]\n", ("tasks[0]: found 1",)),
    "classes: numbers": (OWN + "  classes: [0, 1]\n", ("tasks[0].classes[0]: found 0", "quotes")),
    "classes: yes, no": (OWN + "  classes: [yes, no]\n", ("written yes", "quotes: 'yes'")),
    "classes: text": (OWN + "  classes: cat\n", ("tasks[0].classes: found 'cat'", "a list")),
    "classes: fields": (OWN + "  classes: {0: cat}\n", ("line 5", "'0'", "a number")),
    "a column": (OWN + "  image_column: 3\n", ("tasks[0].image_column: found 3", "quotes")),
    "a split": (OWN + "  splits: {val: true}\n", ("tasks[0].splits.val: found true",)),
    "a share": (OWN + "  splits: {val: 3}\n", ("tasks[0].splits", "between 0 and 1")),
    "store: number": ("store: 5\ntasks: [glyphs/greek-blur]\n", ("store: found 5", "text")),
    "store: fields": ("store: {url: x}\ntasks: [a]\n", ("store: found {url: 'x'}",)),
    "a section that is text": (HEAD + "talos: dense\n", ("talos: found 'dense'", "`density:`")),
    "a section that is null": (HEAD + "talos:\n", ("talos: found null", "fields")),
    "tasks: number": ("store: s\ntasks: 5\n", ("tasks[0]: found 5", "name of a task")),
    "tasks: null": ("store: s\ntasks:\n", ("tasks: found null", "a list")),
    "tasks: nothing": ("store: s\n", ("tasks: this field is required",)),
    "tasks: empty": ("store: s\ntasks: []\n", ("tasks: found []", "at least 1 item")),
    "tasks: true": ("store: s\ntasks: [true]\n", ("tasks[0]: found true",)),
    "tasks: lists": ("store: s\ntasks: [[a, b]]\n", ("tasks[0]: found ['a', 'b']",)),
    "preset: number": ("store: s\ntasks: {preset: 5}\n", ("tasks: unknown preset 5", "clip8")),
    "preset: null": ("store: s\ntasks: {preset: }\n", ("tasks: unknown preset null", "clip8")),
    "preset: list": ("store: s\ntasks: {preset: [clip8]}\n", ("unknown preset ['clip8']",)),
    "preset: fields": ("store: s\ntasks: {preset: {a: b}}\n", ("unknown preset {a: 'b'}",)),
    "preset: true": ("store: s\ntasks: [{preset: true}]\n", ("unknown preset true", "clip8")),
    "preset data: number": (
        "store: s\ntasks: {preset: clip8, data: 5}\n",
        ("preset clip8: data is a URL, not 5",),
    ),
    "preset of a control": (
        HEAD + "evaluate: {control: {preset: 5}}\n",
        ("evaluate.control: unknown preset 5",),
    ),
    "control: a list": (HEAD + "evaluate: {control: [a]}\n", ("evaluate.control: found ['a']",)),
    "unseen: number": (HEAD + "evaluate: {unseen: 5}\n", ("evaluate.unseen: found 5", "`tasks:`")),
    "pairs of three": (
        HEAD + "evaluate: {disentanglement: {pairs: [[a, b, c]]}}\n",
        ("evaluate.disentanglement.pairs[0]", "a list of 2 items"),
    ),
    "a method that is a number": (HEAD + "basis: {method: [5]}\n", ("basis.method[0]: found 5",)),
    "control: true": (HEAD + "evaluate: {control: true}\n", ("the name of a task",)),
    "disentanglement: list": (HEAD + "evaluate: {disentanglement: [1]}\n", ("true, false, or",)),
    "epochs of all presets": (
        "store: s\ntasks: {preset: clip8, epochs: yes}\n",
        ("tasks[0].epochs: found true; allowed", "tasks[7].epochs"),
    ),
    "a field of a section": (HEAD + "epochs: 3\n", ("epochs: unknown field", "in finetune")),
    "a field with a dash": (HEAD + "finetune: {batch-size: 3}\n", ("did you mean batch_size?",)),
    "a field without a name": (HEAD + "'': 3\n", ("'': unknown field",)),
    "a field with an odd character": (HEAD + "seed\u200b: 3\n", ("'seed\\u200b'", "mean seed?")),
    "a preset in capitals": ("store: s\ntasks: CLIP8\n", ("'CLIP8'", "did you mean clip8")),
    "no store": ("tasks: [glyphs/greek-blur]\n", ("store: this field is required: a folder",)),
    "an unknown field": (HEAD + "seeds: 1\n", ("seeds: unknown field (did you mean seed?)",)),
    "a long unknown field": (HEAD + f"{'x' * 900}: 1\n", ("unknown field",)),
    # Values
    "no braces": (OWN + "  templates: ['a photo']\n", ("templates", "'a photo'", "exactly one {}")),
    "two braces": (OWN + "  templates: ['{} {}']\n", ("templates", "'{} {}'", "exactly one {}")),
    "a number in braces": (OWN + "  templates: ['a {0}']\n", ("'a {0}'", "no other braces")),
    "a name in braces": (OWN + "  templates: ['a {c} {}']\n", ("'a {c} {}'", "no other braces")),
    "doubled braces": (OWN + "  templates: ['a {{}}']\n", ("'a {{}}'", "no other braces")),
    "half a brace": (OWN + "  templates: ['a {} {']\n", ("'a {} {'", "no other braces")),
    "a format": (OWN + "  templates: ['a {:>99} {}']\n", ("no other braces",)),
    "no templates": (OWN + "  templates: []\n", ("templates: give at least one",)),
    "a blank class": (OWN + "  classes: [cat, ' ']\n", ("classes: a name is blank",)),
    "classes twice": (OWN + "  classes: [cat, cat]\n", ("each name once",)),
    "a blank column": (OWN + "  label_column: ' '\n", ("label_column", "blank")),
    "classes that look alike": (OWN + "  classes: [cat, 'cat ']\n", ("differ only in white",)),
    "invisible": (OWN + '  classes: [cat, "cat\\u200b"]\n', ("'cat' and 'cat\\u200b'", "rename")),
    "a share in quotes": (OWN + "  splits: {val: '0.1'}\n", ("'0.1'", "without quotes")),
    "a share in percent": (OWN + "  splits: {val: 10%}\n", ("'10%'", "as in `val: 0.1`")),
    "1e18 epochs": (HEAD + "finetune: {epochs: 1e18}\n", ("finetune.epochs", "100,000")),
    "1e9 points": (
        HEAD + "search: {coefficients: {points: 1000000000}}\n",
        ("search.coefficients.points: found 1000000000", "from 2 to 10,000"),
    ),
    "1e9 points of pairs": (
        HEAD + "evaluate: {disentanglement: {points: 1e9}}\n",
        ("evaluate.disentanglement.points", "from 2 to 200"),
    ),
    "a huge batch": (HEAD + "finetune: {batch_size: 1e12}\n", ("finetune.batch_size",)),
    "huge sizes": (HEAD + "search: {sizes: [1e15]}\n", ("search.sizes[0]", "1,000,000")),
    "endless retries": (HEAD + "resources: {max_retries: 1e15}\n", ("resources.max_retries",)),
    "endless patience": (
        HEAD + "resources: {storage_timeout_s: 1e12}\n",
        ("resources.storage_timeout_s", "31,622,400"),
    ),
    "many shards": (HEAD + "resources: {shards: 1e7}\n", ("resources.shards", "10,000")),
    "a long name": (OWN.replace("own", "a" * 300), ("tasks[0].name", "at most 200")),
    "a name with a space": (OWN.replace("own", "my task"), ("tasks[0].name", "'my task'")),
    "an invisible name": (OWN.replace("own", "o\u200bn"), ("'o\\u200bn'", "zero width space")),
    "a look-alike": (OWN.replace("own", "\u043ewn"), ("U+043E, cyrillic small letter o",)),
    "a dot": (OWN.replace("own", "."), ("tasks[0].name: found '.'", "begins with a letter")),
    "a name with a backslash": (OWN.replace("own", "a\\b"), ("tasks[0].name: found 'a\\b'",)),
    "dots at the end": (tasks("a.", "a"), ("a. and a", "dots at the end")),
    "a name upwards": (OWN.replace("own", "a/../b"), ("tasks[0].name", "'a/../b'")),
    "a blank name": (OWN.replace("own", "' '"), ("tasks[0].name", "' '")),
    "a long name of all": (HEAD + f"name: {'n' * 999}\n", ("name: found 'nnn", "at most 200")),
    "twins in case": (tasks("Cars", "cars"), ("Cars and cars", "upper and lower case")),
    "twins of the control": (
        tasks("a", "B") + "evaluate: {control: {name: b, data: /d}}\n",
        ("B and b", "upper and lower case", "control"),
    ),
    "twins of the unseen": (
        tasks("a", "B") + "evaluate: {unseen: [{name: A, data: /d}]}\n",
        ("a and A", "upper and lower case"),
    ),
    "a folder of a twin": (tasks("cars", "Cars/red"), ("cars and Cars/red", "folder")),
    "folders in case": (tasks("Cars/red", "cars/blue"), ("Cars/", "cars/", "case")),
    "a name twice": (tasks("a", "a"), ("given more than once: a",)),
    "many unknown tasks": (
        "store: s\ntasks:\n" + "".join(f"- t{number}\n" for number in range(9999)),
        ("tasks[0]: unknown task 't0'", "… and more of the kind"),
    ),
    "many unknown additions": (
        HEAD + f"evaluate: {{additions: [[{', '.join(f't{n}' for n in range(2000))}]]}}\n",
        ("unknown: t0, t1", "more"),
    ),
    "data: memory": (OWN.replace("/data", "memory://x"), ("tasks[0].data", "memory of one")),
    "data: Windows": (OWN.replace("/data", "C:\\data"), ("tasks[0].data: 'C:\\data'", "Windows")),
    "data: blank": (OWN.replace("/data", "''"), ("tasks[0].data", "blank")),
    "data: no bucket": (OWN.replace("/data", "s3://"), ("tasks[0].data", "no bucket")),
    "data: scheme": (OWN.replace("/data", "no://x"), ("tasks[0].data", "unknown scheme 'no'")),
    "data: a variable": (OWN.replace("/data", "$DATA/x"), ("$DATA", "not filled in", "envsubst")),
    "data: a host": (OWN.replace("/data", "file://host/x"), ("tasks[0].data", "file:///folder")),
    "data: a wrapper": (OWN.replace("/data", "cached://x"), ("cached://", "only wraps")),
    "data: capitals": (OWN.replace("/data", "Torchvision:DTD"), ("in lower case",)),
    "data: a list": (OWN.replace("/data", "[/a]"), ("tasks[0].data: found ['/a']", "a folder")),
    "a relative path of Windows": (OWN.replace("/data", "my\\data"), ("'my\\data'", "Windows")),
    "data: spaces": (OWN.replace("/data", "'/data '"), ("tasks[0].data", "white space")),
    "preset data: blank": ("store: s\ntasks: {preset: clip8, data: ''}\n", ("tasks", "blank")),
    "root: blank": (
        OWN.replace("/data", "torchvision:MNIST\n  root: ' '"),
        ("tasks[0].root", "blank"),
    ),
    "root: a URL": (
        OWN.replace("/data", "torchvision:MNIST\n  root: s3://b/x"),
        ("tasks[0].root", "a folder of this machine"),
    ),
    "a model of a variable": (HEAD + "model: {name: 'local-dir:$X/y'}\n", ("$X is not filled",)),
    "a model without a name": (HEAD + "model: {name: ''}\n", ("model.name", "blank")),
    "anonymous: text": (HEAD + "resources: {anonymous: 'yes'}\n", ("resources.anonymous",)),
}


def refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], code: int, words: tuple[str, ...]
) -> str:
    """Run a command that is refused; the message, which names `words` and nothing of libraries."""
    start = time.monotonic()
    assert main(arguments) == code
    message = capsys.readouterr().err
    assert time.monotonic() - start < LONGEST_S
    assert [word for word in words if word not in message] == [], message
    assert [word for word in LIBRARY if word in message] == [], message
    assert len(message) < 6000
    return message


@pytest.mark.parametrize(("text", "words"), FILES.values(), ids=FILES)
def test_a_file_that_is_refused(
    text: str | bytes, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(["plan", str(file)], capsys, 1, words)
    assert message.startswith(f"error: {file}")


# What is read: the text, the field, and its value.
READ: dict[str, tuple[str | bytes, str, Any]] = {
    "a byte order mark": ("\ufeff" + HEAD + "seed: 3\n", "seed", 3),
    "Windows lines": (HEAD.replace("\n", "\r\n") + "seed: 3\r\n", "seed", 3),
    "an exponent": (HEAD + "finetune: {lr: 1e-5}\n", "finetune.lr", 1e-5),
    "an exponent and a fraction": (HEAD + "finetune: {lr: 1.5e-4}\n", "finetune.lr", 1.5e-4),
    "an exponent of a fraction": (HEAD + "finetune: {epochs: .5e1}\n", "finetune.epochs", 5.0),
    "a whole exponent": (HEAD + "data: {max_pixels: 1e6}\n", "data.max_pixels", 1_000_000),
    "a whole float": (HEAD + "finetune: {batch_size: 32.0}\n", "finetune.batch_size", 32),
    "a float that is whole": (HEAD + "finetune: {epochs: 3}\n", "finetune.epochs", 3.0),
    "a number with _": (HEAD + "data: {max_pixels: 1_000_000}\n", "data.max_pixels", 1_000_000),
    "base 16": (HEAD + "seed: 0x10\n", "seed", 16),
    "zero": (HEAD + "seed: 0\n", "seed", 0),
    "no clipping": (HEAD + "finetune: {clip: 1e9}\n", "finetune.clip", 1e9),
    "no": (HEAD + "evaluate: {negation: no}\n", "evaluate.negation", False),
    "text in quotes": (OWN + "  classes: ['no', '010', '12:30']\n", "tasks.0.classes.1", "010"),
    "an exponent as a name": (OWN + "  classes: [1e3, 2e3]\n", "tasks.0.classes.0", "1e3"),
    "a class of words": (OWN + "  classes: [hot dog, 'a, b']\n", "tasks.0.classes.1", "a, b"),
    "other alphabets": (OWN + "  classes: [ネコ, Ñandú, 🐈]\n", "tasks.0.classes.2", "🐈"),
    "a share": (OWN + "  splits: {val: 1e-1}\n", "tasks.0.splits.val", 0.1),
    "a split": (OWN + "  splits: {val: dev}\n", "tasks.0.splits.val", "dev"),
    "an anchor": (
        "store: s\ntasks:\n- {name: a, data: /a, templates: &t ['a {}.']}\n"
        "- {name: b, data: /b, templates: *t}\n",
        "tasks.1.templates.0",
        "a {}.",
    ),
    "a merge key": (
        "store: s\ntasks:\n- &t {name: a, data: /a, epochs: 2}\n- {<<: *t, name: b}\n",
        "tasks.1.epochs",
        2.0,
    ),
    "a merge key that is replaced": (
        "store: s\ntasks:\n- &t {name: a, data: /a, epochs: 2}\n- {name: b, epochs: 3, <<: *t}\n",
        "tasks.1.epochs",
        3.0,
    ),
    "a document of its own": ("---\n" + HEAD + "seed: 4\n...\n", "seed", 4),
    "a name of 200": (OWN.replace("own", "a" * 200), "tasks.0.name", "a" * 200),
    "a device of Windows": (OWN.replace("own", "con/aux.txt"), "tasks.0.name", "con/aux.txt"),
    "names that begin alike": (tasks("cars", "cars-2", "car/s"), "tasks.2.name", "car/s"),
    "a colon in data": (OWN.replace("/data", "/data/a:b"), "tasks.0.data", "/data/a:b"),
    "a space in data": (OWN.replace("/data", "/my data/x"), "tasks.0.data", "/my data/x"),
    "data on the hub": (
        OWN.replace("/data", "hf://datasets/a/b@refs/x"),
        "tasks.0.data",
        "hf://datasets/a/b@refs/x",
    ),
    "a public bucket": (HEAD + "resources: {anonymous: true}\n", "resources.anonymous", True),
    "JSON": ('{"store": "s", "tasks": ["glyphs/greek-blur"], "seed": 5}', "seed", 5),
}


@pytest.mark.parametrize(("text", "field", "value"), READ.values(), ids=READ)
def test_a_file_that_is_read(text: str, field: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_bytes(text.encode())
    made: Any = load_experiment(file)
    for name in field.split("."):
        made = made[int(name)] if name.isdigit() else getattr(made, name)
    assert made == value and type(made) is type(value)


def test_values_are_those_of_the_yaml_package() -> None:
    text = HEAD + "a: [1, 1.5, yes, ~, 'x', {b: null}]\nc: &c {d: 2}\ne: {<<: *c, f: *c}\n"
    assert parse_yaml(text) == yaml.safe_load(text)


# What is wrong with a path: how to make it, and what the message must name.
def folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


PATHS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing": (lambda path: path, ("there is no such file", "check the path")),
    "a folder": (folder, ("this is a folder", "name a file in it")),
    "below a file": (lambda path: Path(__file__) / "x.yaml", ("is a file, not a folder",)),
    "a long name": (lambda path: path.with_name("x" * 300), ("path is too long",)),
    "a loop": (loop, ("symbolic links lead in a circle",)),
    "a pipe": (pipe, ("nothing has come through it", "name a file")),
}


@pytest.mark.parametrize(("make", "words"), PATHS.values(), ids=PATHS)
def test_a_path_that_is_refused(
    make: Callable[[Path], Path],
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raytvb.experiment.parsing.PIPE_S", 0.1)
    path = make(tmp_path / "experiment.yaml")
    refused(["plan", str(path)], capsys, 1, (str(path), *words))


def test_a_file_may_come_through_a_pipe() -> None:
    reader, writer = os.pipe()
    os.write(writer, (HEAD + "seed: 6\n").encode())
    os.close(writer)
    assert load_experiment(f"/dev/fd/{reader}").seed == 6
    os.close(reader)


# What is wrong with an option: the arguments, the exit code, and what the message must name.
OPTIONS: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    "blank store": (["plan", "FILE", "--store", ""], 2, ("--store", "blank")),
    "white store": (["run", "FILE", "--store", "  "], 2, ("--store", "blank")),
    "memory": (["plan", "FILE", "--store", "memory://x"], 1, ("--store", "memory of one process")),
    "memory to run": (["run", "FILE", "--store", "memory://x"], 1, ("memory of one process",)),
    "a web page": (["plan", "FILE", "--store", "https://x/y"], 1, ("--store", "only be read")),
    "an archive": (["plan", "FILE", "--store", "zip://x"], 1, ("--store", "only be read")),
    "a host": (["plan", "FILE", "--store", "file://host/x"], 1, ("--store", "file:///folder")),
    "a wrapper": (["plan", "FILE", "--store", "simplecache://x"], 1, ("--store", "only wraps")),
    "the root": (["plan", "FILE", "--store", "/"], 1, ("--store", "the root of the disk")),
    "a variable": (["plan", "FILE", "--store", "${HOME}/x"], 1, ("${HOME}", "not filled in")),
    "a template": (["plan", "FILE", "--store", "{{ store }}"], 1, ("--store", "not filled in")),
    "quotes": (["plan", "FILE", "--store", "'x'"], 1, ("--store", "quotes twice")),
    "invisible": (["plan", "FILE", "--store", "a\u200bb"], 1, ("U+200B", "remove it")),
    "no package": (["plan", "FILE", "--store", "gs://b/x"], 1, ("gs://b/x", "not installed")),
    "more settings": (["plan", "FILE", "--store", "jupyter://x"], 1, ("needs settings",)),
    "no slashes": (["plan", "FILE", "--store", "s3:b/x"], 1, ("'s3:b/x'", "s3://bucket/prefix")),
    "unknown scheme": (["plan", "FILE", "--store", "s4://b"], 1, ("--store", "'s4'", "s3://")),
    "one slash": (["plan", "FILE", "--store", "s3:/b/x"], 1, ("--store", "'s3:/b/x'", "s3://")),
    "no bucket": (["plan", "FILE", "--store", "s3://"], 1, ("no bucket", "s3://bucket/prefix")),
    "bad bucket": (["plan", "FILE", "--store", "s3://my bucket/x"], 1, ("'my bucket'", "no name")),
    "credentials": (["plan", "FILE", "--store", "s3://k:s@b/x"], 1, ("AWS_ACCESS_KEY_ID",)),
    "upwards": (["plan", "FILE", "--store", "s3://b/../x"], 1, ("'..'", "s3://b/../x")),
    "trailing space": (["plan", "FILE", "--store", "s3://b/x "], 1, ("white space", "remove it")),
    "a line break": (["plan", "FILE", "--store", "/tmp/a\nb"], 1, ("control character",)),
    "a drive": (["plan", "FILE", "--store", "C:\\data"], 1, ("'C:\\data'", "Windows")),
    "a folder of a drive": (["plan", "FILE", "--store", "C:data"], 1, ("'C:data'", "Windows")),
    "a drive, slashes": (["plan", "FILE", "--store", "D:/data"], 1, ("'D:/data'", "Windows")),
    "a share": (["plan", "FILE", "--store", "\\\\host\\x"], 1, ("Windows",)),
    "a drive's URL": (["plan", "FILE", "--store", "file:///C:/x"], 1, ("Windows",)),
    "a stranger": (["plan", "FILE", "--store", "~nobody-9/x"], 1, ("no such user",)),
    "a file": (["plan", "FILE", "--store", "FILE"], 1, ("FILE", "is a file, not a folder")),
    "a file to run": (["run", "FILE", "--store", "FILE"], 1, ("FILE", "a file")),
    "below a file": (["run", "FILE", "--store", "FILE/x"], 1, ("FILE/x", "is a file")),
    "a long folder": (["plan", "FILE", "--store", "/tmp/" + "x" * 300], 1, ("too long",)),
    "a long path": (["plan", "FILE", "--store", "/tmp" + "/x" * 3000], 1, ("at most 4,096",)),
    "a file elsewhere": (["plan", "s3://b/e.yaml"], 1, ("must be a file of this machine",)),
    "ls of memory": (["ls", "memory://x"], 1, ("memory of one process",)),
    "ls of nothing": (["ls", ""], 2, ("STORE", "blank")),
    "verify of nothing": (["verify", " "], 2, ("STORE", "blank")),
    "spectrum of a drive": (["spectrum", "C:\\x"], 1, ("Windows",)),
    "blank out": (["merge", "x", "--add", "a", "--out", ""], 2, ("--out", "blank")),
    "blank basis": (["merge", "x", "--add", "a", "--basis", "", "--out", "y"], 2, ("--basis",)),
    "blank task": (["merge", "x", "--add", "", "--out", "y"], 2, ("--add", "blank")),
    "a weight alone": (["merge", "x", "--add", "=1", "--out", "y"], 2, ("--add", "NAME=WEIGHT")),
    "a blank file": (["plan", ""], 2, ("it is blank",)),
    "a blank address": (["submit", "FILE", "--address", ""], 2, ("--address", "blank")),
    "no weight": (["merge", "x", "--add", "a=", "--out", "y"], 2, ("'a='", "finite number")),
    "a weight in words": (["merge", "x", "--add", "a=1_0", "--out", "y"], 2, ("finite number",)),
    "a task upwards": (["merge", "x", "--add", "/a", "--out", "y"], 1, ("task '/a'", "raytvb ls")),
    "a basis upwards": (
        ["merge", "x", "--add", "a", "--basis", "../x", "--out", "y"],
        1,
        ("--basis '../x'", "ae-m4"),
    ),
    "5,000 vectors": (["merge", "x", "--vector", "9" * 5000, "--out", "y"], 1, ("--vector '99",)),
    "blank analogy": (["merge", "x", "--analogy", "a", "", "c", "--out", "y"], 2, ("--analogy",)),
    "blank quickstart": (["quickstart", "--store", ""], 2, ("--store", "blank")),
    "memory quickstart": (["quickstart", "--store", "memory://x"], 1, ("memory of one process",)),
    "quickstart elsewhere": (["quickstart", "--store", "s3:/b"], 1, ("--store", "s3://bucket")),
}


@pytest.mark.parametrize(("arguments", "code", "words"), OPTIONS.values(), ids=OPTIONS)
def test_an_option_that_is_refused(
    arguments: list[str],
    code: int,
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(HEAD.replace("STORE", str(tmp_path / "store")))
    named = [argument.replace("FILE", str(file)) for argument in arguments]
    refused(named, capsys, code, tuple(word.replace("FILE", str(file)) for word in words))


# What is wrong in the environment.
VARIABLES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a blank cache": ("RAYTVB_CACHE", " ", ("RAYTVB_CACHE", "blank")),
    "a cache of a variable": ("RAYTVB_CACHE", "$NO/x", ("RAYTVB_CACHE", "$NO is not filled in")),
    "a cache elsewhere": ("RAYTVB_CACHE", "s3://b/x", ("RAYTVB_CACHE", "no folder of this")),
    "a cache that is a file": ("RAYTVB_CACHE", __file__, ("RAYTVB_CACHE", "a file, not a folder")),
    "a long cache": ("RAYTVB_CACHE", "/tmp/" + "x" * 300, ("RAYTVB_CACHE", "too long")),
    "a temporary folder that is a file": ("TMPDIR", __file__, ("TMPDIR", "not a folder")),
    "no temporary folder": ("TMPDIR", "/no/such/folder", ("TMPDIR", "no such file or folder")),
    "an endpoint without a scheme": (
        "AWS_ENDPOINT_URL",
        "localhost:9000",
        ("AWS_ENDPOINT_URL", "'localhost:9000'", "http://host:9000"),
    ),
    "an endpoint of another scheme": ("AWS_ENDPOINT_URL", "s3://host", ("no URL of a server",)),
    "an endpoint without a host": ("AWS_ENDPOINT_URL", "http://", ("no URL of a server",)),
    "a port that is none": ("AWS_ENDPOINT_URL", "http://h:port", ("no URL of a server",)),
    "a large port": ("AWS_ENDPOINT_URL", "http://h:99999", ("no URL of a server",)),
    "half an address": ("AWS_ENDPOINT_URL", "http://[::1", ("no URL of a server",)),
    "a space": ("AWS_ENDPOINT_URL", "http://h :1", ("no URL of a server",)),
    "credentials in the endpoint": ("AWS_ENDPOINT_URL", "http://k:s@h", ("the server alone",)),
    "a query": ("AWS_ENDPOINT_URL", "http://h/?x=1", ("the server alone",)),
    "a bucket at another provider": (
        "AWS_ENDPOINT_URL",
        "https://bucket.fra1.digitaloceanspaces.com",
        ("the bucket 'bucket'",),
    ),
    "no such profile": ("AWS_PROFILE", "nope", ("s3://bucket/prefix", "AWS_PROFILE")),
    "a bucket in the endpoint": (
        "AWS_ENDPOINT_URL",
        "http://127.0.0.1:9/bucket/",
        ("AWS_ENDPOINT_URL", "the bucket 'bucket'", "the server alone"),
    ),
    "a bucket in the host": (
        "AWS_ENDPOINT_URL_S3",
        "https://bucket.s3.amazonaws.com",
        ("AWS_ENDPOINT_URL_S3", "the bucket 'bucket'"),
    ),
}


@pytest.mark.parametrize(("name", "value", "words"), VARIABLES.values(), ids=VARIABLES)
def test_a_variable_that_is_refused(
    name: str,
    value: str,
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(HEAD.replace("STORE", "s3://bucket/prefix"))
    monkeypatch.setenv(name, value)
    refused(["plan", str(file)], capsys, 1, words)


def text_parameters(command: click.Command, *names: str) -> Iterator[tuple[list[str], str]]:
    """The words of every command below, with each of its options and arguments that takes text."""
    for param in command.params:
        if isinstance(param.type, NotBlank):
            yield [*names], max(param.opts, key=len)
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        yield from text_parameters(inner, *names, name)


def test_no_text_of_any_command_may_be_blank(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = list(text_parameters(cli))
    assert (["merge"], "--out") in parameters and len(parameters) > 20
    for names, option in parameters:
        given = [option, *[" "] * 3] if option == "--analogy" else [option, " "]
        refused([*names, *(given if option.startswith("-") else [" "])], capsys, 2, ("blank",))


# What is too much: the text, with limits that a test reaches soon.
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [" + "0, " * 60 + "]", ("line 1", "items in one list")),
        ("a:\n" + "".join(f"  k{n}: 0\n" for n in range(60)), ("line 27", "fields in one section")),
        ("a:\n" + "- [0, 0, 0, 0]\n" * 40, ("line 41", "more than 200 values")),
    ],
)
def test_too_many_values(
    text: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_text, "MOST_ITEMS", 50)
    monkeypatch.setattr(yaml_text, "MOST_VALUES", 200)
    monkeypatch.setattr(yaml_text, "_TOO_MANY", "more than 200 values")
    with pytest.raises(yaml_text.YamlTextError) as error:
        parse_yaml(text)
    assert [word for word in words if word not in str(error.value)] == [], error.value


def test_what_looks_odd_but_is_there_is_taken(tmp_path: Path) -> None:
    for name in ("$RECYCLE.BIN", "a\\b"):
        (tmp_path / name).mkdir()
        assert Store(str(tmp_path / name)).url == str(tmp_path / name)


def test_a_public_bucket_is_read_without_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "_anonymous", False)
    for arguments, anonymous in (["--anonymous"], True), ([], False):
        assert main(["ls", str(tmp_path), *arguments]) == 1
        assert filesystems.is_anonymous() is anonymous
    fields = {"store": "s", "tasks": ["glyphs/greek-blur"], "resources": {"anonymous": True}}
    parse_experiment(fields).resources.apply_to_storage()
    assert Store("s3://bucket/x").fs.anon


@pytest.mark.s3
def test_a_bucket_at_the_end_of_the_endpoint_is_not_an_empty_store(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(s3_environment).write("there", b"x")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{endpoint}/{s3_environment[5:]}")
    with pytest.raises(StoreError, match="the server alone"):
        Store(s3_environment).keys()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{endpoint}/")
    assert Store(s3_environment).keys() == ["there"]


@pytest.mark.s3
def test_without_credentials_the_way_to_public_buckets_is_named(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match="anonymous: true"):
        Store(s3_environment).keys()


def test_two_thousand_tasks_are_read_in_linear_time() -> None:
    def seconds(count: int) -> float:
        fields = {"store": "s", "tasks": [{"name": f"t{n}", "data": "/d"} for n in range(count)]}
        start = time.process_time()
        made = parse_experiment(fields)
        made.restricted(set(made.task_names[:-1]))
        return time.process_time() - start

    assert seconds(2000) < 1.5
    assert seconds(4000) < 4 * max(0.2, seconds(1000)) * 2
